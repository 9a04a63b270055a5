"""The phases of a decode step, in order: a file each.

A phase is a function of the program's `Env` (and, where every layer has it, the layer's
number). It reads what earlier phases stored and stores what later ones read; it knows
nothing of the synchronisation between them.
"""
