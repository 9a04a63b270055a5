"""The decode step as one stream of weight tiles: the kernel that never stops reading.

Each program reads its share of all weights of the step in one software-pipelined loop, so
that tiles of later segments are on their way while it waits for activations. Programs hand
activations to each other through words that carry their own tags; there is no barrier.
"""
