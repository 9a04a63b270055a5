"""The tags that steps leave in a cache's exchange, beside those of the model of the hand-overs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from search.aged import Poison, aged_counters, poison_of

from pallas_kernels.stream.launch import layout_of
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["check_tags", "same_tags"]


def same_tags(got: np.ndarray, want: np.ndarray, poison: Poison) -> None:
    """Fails unless counters differ in what words say alone, and poison takes no tag."""
    there = poison.keep != 0  # a pair's value may be 0: the best token, for one
    assert np.array_equal(got[there] != 0, want[there] != 0)
    assert np.array_equal(got & poison.keep | poison.set, want & poison.keep | poison.set)
    written = want != 0
    assert np.array_equal(want[written], (want & poison.keep | poison.set)[written])


def check_tags(plan: StreamPlan, counters: jax.Array, lengths: Sequence[int]) -> None:
    """The same of a new cache's counters after its first step, from these lengths on."""
    layout, words = layout_of(plan), counters.shape[0]
    want = aged_counters(plan, layout, 1, words, lengths)
    same_tags(np.asarray(counters), want, poison_of(plan, layout, words))
