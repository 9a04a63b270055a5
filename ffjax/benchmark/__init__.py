"""Measuring decode steps: how long, how many bytes, and whether the numbers are right.

`bandwidth` measures what the device can read; `inputs` makes weights and a cache; `contenders`
and `baseline` are what can be timed; `timing` times any of them the same way; `check` compares
the step that was timed with another implementation; `suite` runs a sweep; `report` and `plot`
show it. `ffjax.commands.bench` is the command line on top.
"""
