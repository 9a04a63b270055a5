"""Whole steps of one program as Mosaic GPU is given them, run on a CPU with all of their PTX."""

from __future__ import annotations

import dataclasses
import re
from typing import Any
from unittest import mock

import jax.numpy as jnp
import pytest
from decode_cases import (
    dims_of,
    filled_cache,
    kernel_inputs,
    random_model,
    random_tokens,
    small_config,
)
from mosaic_edits import edited
from mosaic_machine import MosaicError, MosaicMachine, run
from ptx_machine import PtxError
from quantize_cases import FOR_KERNELS, GROUPED, kernel_config
from spec_cases import check_buffers
from step_cases import reference
from stream_cases import check, machine

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from pallas_kernels.mosaic_gpu import launch as launching
from pallas_kernels.mosaic_gpu.backend import MosaicGpu
from pallas_kernels.mosaic_gpu.threads import Threads
from pallas_kernels.stream import launch as stepping
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.layout import ALIGNMENT, SharedLayout
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import Tuning

pytestmark = pytest.mark.once(
    "The machine takes long; a sample shows that a step is lowered with every JAX.",
    sample=["test_a_step_matches_the_model[one sequence]"],
)

CAPACITY = 66
# Each with the sequences' lengths, the program's warps, and slots of the ring; None: the plan's. Of
# two, both are always asked for: each tile comes to the slot of the one that has just been used.
# Of more, tiles of bfloat16 are asked for too late for a missing barrier to be seen.
STEPS: dict[str, tuple[ModelConfig, list[int], int, int | None]] = {
    "one sequence": (small_config(num_layers=1), [5], 4, 2),
    "three sequences, an empty one": (
        small_config(num_layers=1, post_norm=True),
        [0, 64, 9],
        8,
        None,
    ),
    # Indices are made anew, and a wait keeps no addresses.
    "normed queries": (small_config(num_layers=1, qk_norm="full"), [5], 4, None),
    "integers": (kernel_config(FOR_KERNELS["mixed"]), [7], 4, None),
    "integers of two": (kernel_config(FOR_KERNELS["mixed otherwise"]), [3, 30], 4, None),
    # Each matrix in groups of another kind: what is collected for one is of use to another or not.
    "groups": (kernel_config(GROUPED["of files"]), [5], 4, None),
    "groups, otherwise": (kernel_config(GROUPED["of files, otherwise"]), [65], 4, None),
}


def stepped(plan: StreamPlan, model: Any, cache: KVCache, tokens: Any) -> tuple[Any, Any, KVCache]:
    """A step of one program, of tokens `[B]`: logits, token and cache."""
    layout = SharedLayout.of(plan)

    def prepare(of: MosaicMachine) -> None:
        base = -(-of.ring // ALIGNMENT) * ALIGNMENT
        of.spare = range(base + layout.spare, base + layout.sums)
        # Beyond a short row, anything may lie in the place of integers (x, y) and scales; in that
        # of bfloat16, where no other weights are, numbers alone: 0x7F7F is 3e38.
        of.poisoned = re.compile(r"^%?[xy](_scale)?(_\d+)?/")
        of.poison = 0xFF if plan.quantized else 0x7F

    def launch(kernel: Any, *, shared_bytes: int, programs: int, name: str, **how: Any) -> Any:
        assert programs == 1 and name
        return run(kernel, ring_bytes=shared_bytes, once=False, prepare=prepare, **how)[0]

    with mock.patch.object(launching, "launch", launch):
        logits, token, state, _ = stream_step(plan, *kernel_inputs(model, cache), tokens)
    state = {name: jnp.asarray(x) for name, x in state._asdict().items()}
    return logits, token, dataclasses.replace(cache, **state)


@pytest.mark.drawn(
    "A batch with an empty sequence, one sequence, normed queries, and integers.",
    sample=[
        "test_a_step_matches_the_model[one sequence]",
        "test_a_step_matches_the_model[three sequences, an empty one]",
        "test_a_step_matches_the_model[normed queries]",
        "test_a_step_matches_the_model[integers of two]",
    ],
)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_matches_the_model(name):
    config, lengths, num_warps, slots = STEPS[name]
    tuning = Tuning(backend="mosaic_gpu", num_warps=num_warps, slots=slots)
    plan = make_stream_plan(dims_of(config, len(lengths), CAPACITY), machine(1), tuning)
    model, cache = random_model(config), filled_cache(config, lengths, CAPACITY)
    tokens = random_tokens(config, len(lengths))
    got = stepped(plan, model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)
    check_buffers(plan, model, cache, tokens, got)


MEETS, FEEDS = "_meet(env)", "feed_ring(env, index + 1, tiles_ahead(env, place))"


@pytest.mark.parametrize(
    ("owner", "name", "old", "new"),
    [
        # The kernel's own barriers, and those of what is summed across warps.
        (MosaicGpu, "barrier", "self._threads.meet()", "pass"),
        (Threads, "_put", "if self._in_use:", "if False:"),
        (MosaicGpu, "assembly", "for x in args for k in some", "for k in some for x in args"),
        (Threads, "reduced", "if 0 <= places", "if 0 < places"),
        # The next tile is asked for while other warps may use the one in its slot.
        (
            stepping,
            "stream_kernel",
            f"{MEETS}\n        {FEEDS}",
            f"{FEEDS}\n        {MEETS}",
        ),
    ],
    ids=["no barriers", "a barrier too few", "operands", "a lane", "fed before the barrier"],
)
def test_a_planted_error_is_noticed(owner, name, old, new):
    noticed = (AssertionError, MosaicError, PtxError)
    with edited(owner, name, old, new), pytest.raises(noticed):
        test_a_step_matches_the_model("one sequence")
