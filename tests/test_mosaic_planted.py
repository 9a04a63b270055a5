"""Errors that are planted in the lowering for Mosaic GPU: each is noticed by one of its checks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
import test_mosaic_layout as of_layouts
import test_mosaic_lowering as of_lowering
import test_mosaic_rules as of_rules
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from mosaic_edits import edited
from mosaic_machine import MosaicError
from ptx_machine import PtxError

from pallas_kernels.mosaic_gpu import arithmetic, memory, threads
from pallas_kernels.mosaic_gpu.backend import MosaicGpu
from pallas_kernels.mosaic_gpu.body import Body
from pallas_kernels.mosaic_gpu.layout import Layout
from pallas_kernels.mosaic_gpu.memory import Memory
from pallas_kernels.mosaic_gpu.threads import Threads
from pallas_kernels.mosaic_gpu.values import Lazy

pytestmark = pytest.mark.once(
    "The lowering is ours; a sample shows that its checks find errors.",
    sample=["test_a_planted_error_is_noticed[no barrier before threads read]"],
)

NOTICED = (AssertionError, MosaicError, PtxError, ir.MLIRError)


# Quick ones first: that which notices an error is the last one to run.
CHECKS: list[Callable[[], Any]] = [
    functools.partial(of_rules.test_branches_leave_an_array_where_the_first_one_has_it, 1, True),
    functools.partial(of_lowering.test_what_many_threads_hold_one_stores, 128),
    functools.partial(of_lowering.test_arrays_of_several_axes_are_indexed, 128),
    functools.partial(of_lowering.test_one_of_two_branches_is_taken, 5, 256),
    functools.partial(
        of_lowering.test_shared_memory_that_is_free_before_a_loop_may_be_used_within_and_behind, 256
    ),
    functools.partial(
        of_lowering.test_what_a_mask_hides_is_neither_loaded_nor_stored, jnp.bool_, 32
    ),
    functools.partial(of_lowering.test_the_nearest_of_three_branches_is_taken, 1, 128),
    functools.partial(
        of_lowering.test_what_follows_from_indices_is_made_where_it_is_wanted, 0, 128
    ),
    functools.partial(of_lowering.test_indices_that_are_made_anew_are_the_same, 128),
    of_lowering.test_bits_are_compared_and_reduced_as_0_and_1,
    functools.partial(of_lowering.test_numbers_are_converted_and_rounded_to_nearest, jnp.float32),
    *(functools.partial(of_layouts.check_moved, seed) for seed in range(15)),
    *(functools.partial(of_layouts.check_summed, seed) for seed in range(12)),
    functools.partial(of_rules.test_results_are_those_of_the_elements_that_were_bound, 2),
    functools.partial(of_rules.test_rows_go_through_shared_memory, 32),
    functools.partial(of_rules.test_words_of_other_layouts_are_stored),
    *(functools.partial(of_rules.test_triton_and_mosaic_bind_the_same, x) for x in of_rules.BODIES),
    *(functools.partial(of_lowering.check_random, seed) for seed in range(12)),
]

EDITS: dict[str, tuple[Any, str, str, str]] = {
    # Barriers
    "no barrier before threads read": (
        Threads,
        "_put",
        "_to_word(value), mine])\n    self.meet()",
        "_to_word(value), mine])",
    ),
    "no barrier before threads write": (Threads, "_put", "if self._in_use:", "if False:"),
    "readers of a move are forgotten": (
        Threads,
        "_through_shared_memory",
        "self._in_use = True",
        "pass",
    ),
    "readers of a sum are forgotten": (Threads, "_among_warps", "self._in_use = True", "pass"),
    "a loop's last turn is forgotten": (Threads, "within", "before or again", "before"),
    "readers in a branch are forgotten": (
        Threads,
        "within",
        "self._in_use = before or self._in_use",
        "self._in_use = before",
    ),
    # Lanes
    "a sum's lane": (Threads, "_exchanged", "word, distance)", "word, distance ^ 3)"),
    "a moved element's lane": (
        Threads,
        "_shuffled",
        "self._field(wanted, 1)",
        "self._field(place, 1)",
    ),
    "a moved register's bit": (
        Threads,
        "_shuffled",
        "register >> (-1 - wanted)",
        "register >> -wanted",
    ),
    "a warp's bit is thought a lane's": (Threads, "_moved", ">= _LANE_BITS", "> _LANE_BITS"),
    "lane 1 is not summed": (Threads, "reduced", "if 0 <= places", "if 0 < places"),
    "warps overlap": (Threads, "_among_warps", "number * first", "number"),
    # Layouts
    "no and yes": (Threads, "_moved", "yes, no)", "no, yes)"),
    "a register for another": (
        Threads,
        "_moved",
        "(wanted >> (-1 - b) & 1)",
        "(wanted >> (-b) & 1)",
    ),
    "a run of bits that is none": (Threads, "element", "== place + run", ">= place + run"),
    "a field's upper bits": (Threads, "_field", "log2(self.count)", "log2(self.count) - 1"),
    "bits of an element": (Layout, "element", "1 << bit", "1 << (bit ^ 1)"),
    "bits of a part": (Layout, "restricted", "<< i for i", "<< (len(kept) - 1 - i) for i"),
    "registers of a part": (Threads, "reduced", "which[register]]", "register % len(groups)]"),
    "the order of axes": (Body, "_broadcast", "reversed([*zip(", "([*zip("),
    # Memory
    "all threads store": (Layout, "free", "return (threads - 1)", "return 0"),
    "all threads store what is masked": (
        Memory,
        "store",
        "guard = arith.andi(guard, mine)",
        "pass",
    ),
    "all threads store what is not masked": (Memory, "store", "guard = mine", "guard = None"),
    "all threads put": (
        Threads,
        "_put",
        "self.where_not(free) if free",
        "self.where_not(0) if free",
    ),
    "no mask at a load": (Memory, "load", "None if masks is None else masks[k]", "None"),
    "no other number": (Memory, "load", "if other is not None", "if False"),
    "a stride": (Memory, "_addresses", "sizes[axis + 1 :]", "sizes[axis:]"),
    "a bit of all ones": (memory, "_to_bound", "arith.extui", "arith.extsi"),
    "words of another type": (threads, "_from_word", "if width(kind) < 32:", "if False:"),
    # Control flow
    "a branch is passed over": (Body, "_cond", "choose(first + 1)", "choose(len(branches) - 1)"),
    "a carried register": (Body, "_unflat", "rest[layout.registers :]", "rest[1:]"),
    "what another branch has made": (Lazy, "at", "if block in blocks", "if True"),
    # What is bound to texts
    "elements and operands change places": (
        MosaicGpu,
        "assembly",
        "for x in args for k in some",
        "for k in some for x in args",
    ),
    "results of other elements": (
        MosaicGpu,
        "assembly",
        "[i * together : (i + 1) * together]",
        "[i :: len(out)]",
    ),
    "bytes of an element": (MosaicGpu, "addresses", "ref.item", "2"),
    "offsets without a sign": (
        MosaicGpu,
        "addresses",
        "element_address(ref.base, offset, ref.item)",
        "arith.addi(ref.base, arith.shli(arith.extui(integer(64), offset), "
        "constant(integer(64), ref.item.bit_length() - 1)))",
    ),
    "an index that another one follows from": (
        Lazy,
        "anew",
        "return self._make(layout)",
        "return self._make(Layout(layout.places[::-1], layout.register_bits))",
    ),
    "where the ring begins": (MosaicGpu, "ring_base", "alignment - 1)", "alignment)"),
    "arrays in any layout": (
        Body,
        "_by_rule",
        "else self._held(x, layout)",
        "else self._threads.held(x)",
    ),
    "a branch in any layout": (
        Body,
        "_cond",
        "return self._flat(results, layouts)",
        "return self._flat(results)",
    ),
    # Numbers
    "a whole number that is a bit": (arithmetic, "convert", "_F.UNE", "_F.OEQ"),
    "a bit that is -1": (arithmetic, "_is_unsigned", '("u", "bool")', '("u",)'),
}


def notice() -> None:
    for check in CHECKS:
        check()


@pytest.mark.parametrize("name", EDITS)
def test_a_planted_error_is_noticed(name):
    with edited(*EDITS[name]), pytest.raises(NOTICED):
        notice()
