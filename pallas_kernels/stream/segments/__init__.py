"""What is particular to each segment: what becomes of its sums, and what follows its last tile.

`finish_*` takes the sums of the tiles of a flush. `leave_*`, or of attention `attend_parts` and
`combine_parts`, and of both blocks `close_block` and `add_block`, run once after a program's last
tile of the segment. `kernel` says when. What a segment hands over lies in the order in which
its reader loads it, so it names the segment that reads next.
"""
