"""What is particular to each segment: what becomes of a tile's sums, and of its last tile.

`finish_*` takes the sums of one tile, `leave_*` runs once behind a program's last tile of the
segment. They know nothing of the order of the stream.
"""
