"""What Pallas does not offer, in PTX: bulk copies, products in registers, words that are polled.

A file has a kind of text: `write_*` functions write it with the assembler (`pallas_kernels.asm`),
an `Operation` makes a primitive of it, and a function that the kernel calls says what it does.
`pallas_kernels.inline_ptx` hands texts to the backend that compiles; none is known here. What a
program hands to others has a plain version for interpret mode; the ring and the products are only
used compiled.
"""

from pallas_kernels.inline_ptx.anew import anew
from pallas_kernels.inline_ptx.operation import Choice
from pallas_kernels.stream.ptx.address import UNIT, Begin, begin_words
from pallas_kernels.stream.ptx.arrival import wait_copies
from pallas_kernels.stream.ptx.attend import attend_split
from pallas_kernels.stream.ptx.boxes import MAP_BYTES, TensorMap, make_map
from pallas_kernels.stream.ptx.cache import CacheFeed, feed_cache
from pallas_kernels.stream.ptx.combine import combine_splits
from pallas_kernels.stream.ptx.digits import pack_digits, unpack_digits
from pallas_kernels.stream.ptx.feed import MAP_IN_CONTROL, Feed, feed_ring, start_barriers
from pallas_kernels.stream.ptx.giving_up import said_by, say_where
from pallas_kernels.stream.ptx.group_sums import GroupSums, sum_groups
from pallas_kernels.stream.ptx.half2 import unpack_half2
from pallas_kernels.stream.ptx.held import (
    ONES,
    NormRow,
    pack_held,
    pack_held_digits,
    prefetch_pieces,
)
from pallas_kernels.stream.ptx.integers import IntegerTile, multiply_integers
from pallas_kernels.stream.ptx.join import Joined, join_warps
from pallas_kernels.stream.ptx.product import multiply_tile, sum_shared
from pallas_kernels.stream.ptx.shared import (
    clear_shared,
    read_row,
    ring_base,
    write_halves,
    write_row,
)
from pallas_kernels.stream.ptx.squares import sum_squares
from pallas_kernels.stream.ptx.swizzle import Lines
from pallas_kernels.stream.ptx.words import (
    collect_each,
    collect_words,
    load_pieces,
    store_pair,
    store_word,
)

__all__ = [
    "MAP_BYTES",
    "MAP_IN_CONTROL",
    "ONES",
    "UNIT",
    "Begin",
    "CacheFeed",
    "Choice",
    "Feed",
    "GroupSums",
    "IntegerTile",
    "Joined",
    "Lines",
    "NormRow",
    "TensorMap",
    "anew",
    "attend_split",
    "begin_words",
    "clear_shared",
    "collect_each",
    "collect_words",
    "combine_splits",
    "feed_cache",
    "feed_ring",
    "join_warps",
    "load_pieces",
    "make_map",
    "multiply_integers",
    "multiply_tile",
    "pack_digits",
    "pack_held",
    "pack_held_digits",
    "prefetch_pieces",
    "read_row",
    "ring_base",
    "said_by",
    "say_where",
    "start_barriers",
    "store_pair",
    "store_word",
    "sum_groups",
    "sum_shared",
    "sum_squares",
    "unpack_digits",
    "unpack_half2",
    "wait_copies",
    "write_halves",
    "write_row",
]
