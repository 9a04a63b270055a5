"""What a whole step is lowered to: things that the compiler takes for granted, or gets wrong.

The compiler puts barriers, shuffles and products of tensor cores after the kernel's inline PTX,
and all of them want whole warps. Threads that waited for words come out of it one by one.

Pallas (JAX 0.11.2) lowers a choice between two plain Python integers to a choice between two bits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from decode_cases import dims_of, small_config
from jax._src.lax.lax import select_n_p
from jax._src.pallas.triton.lowering import triton_lowering_rules
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from ptx_inline import lower_for_gpu
from quantize_cases import FOR_KERNELS, kernel_config
from stream_cases import FAMILIES, H200

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from pallas_kernels.gpu import Gpu
from pallas_kernels.inline_ptx.lowered import REJOIN
from pallas_kernels.launch import StepState
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import Tuning
from pallas_kernels.triton import backend

pytestmark = pytest.mark.once(
    "A sample of shapes shows what a JAX makes of the interpreted kernel.",
    sample=[
        "test_warps_are_whole_behind_every_jump_and_before_every_barrier[integers of several-H200]",
        "test_choices_between_numbers_are_lowered_to_numbers[several tokens]",
        "test_warps_are_whole_behind_every_jump_and_before_every_barrier[2 tokens of several-A100]",
    ],
)

# Every text there is, between them: feeds of few and of many copies, early looks, KV splits that
# are combined, blocks that are normed after, digits of one sequence and of several.
STEPS: dict[str, tuple[ModelConfig, int, int]] = {
    "one sequence": (small_config(), 1, 1),
    "several": (small_config(num_layers=3, post_norm=True, pre_norm=False), 3, 1),
    "wide": (small_config(model_dim=4096, ffw_dim=14_336, num_heads=32), 1, 1),
    "queries that are normed": (small_config(qk_norm="full"), 1, 1),
    "integers": (kernel_config(FOR_KERNELS["mixed"]), 1, 1),
    "integers of several": (kernel_config(FOR_KERNELS["mixed otherwise"]), 2, 1),
    "several tokens": (small_config(num_heads=16, qk_norm="full", window=40), 1, 8),
    "2 tokens of several": (small_config(), 4, 2),
    "two ropes, one of them scaled": (small_config(**FAMILIES["olmo3"]), 1, 1),
    "two ropes, 2 tokens": (small_config(**FAMILIES["olmo3"] | {"rotary_pairs": 10}), 1, 2),
    "every bias": (small_config(**FAMILIES["granite_code"]), 2, 1),
    "a part rotated": (small_config(**FAMILIES["phi3"]), 1, 1),
}

# Of what a tuning may leave out, nothing is left out.
ALL = Tuning(collect_tiles=1, hidden_copies=2)

# Jumps that a warp takes as a whole: of a number of warps, or of all but one; and what its threads
# have voted for.
BY_WARPS = (
    r"setp\.ge\.u32 %is_idle, %(?:thread|quad), (?:32|64|128|256); @%is_idle bra idle;"
    r"|shr\.u32 %warp, %thread, 5; setp\.ne\.u32 %other, %warp, \d+; @%other bra fed;"
    r"|vote\.sync\.all\.pred (%has_come), \1, 0xffffffff; @\1 bra come;(?: bra look;)?"
    r"|setp\.ge\.u32 (%too_many), %looks, \w+; @\2 bra lost;"
)


def lower_step(
    config: ModelConfig,
    batch: int,
    tokens: int,
    tuning: Tuning | None = ALL,
    gpu: Gpu = H200,
) -> None:
    """Lowers a whole step for a GPU that need not be there."""
    d = dims_of(config, batch, 16_384, tokens)
    plan = make_stream_plan(d, gpu, tuning)
    cache = jax.eval_shape(lambda: KVCache.create(config, batch, d.capacity, tokens=tokens))
    counters = cache.counters if tokens == 1 else cache.wide_counters
    state = StepState(cache.k, cache.v, cache.lengths, counters)
    step = functools.partial(stream_step, plan)
    fed = jax.ShapeDtypeStruct((d.columns,), jnp.int32)
    lower_for_gpu(step, d.abstract_weights(), state, fed)


def texts(
    config: ModelConfig,
    batch: int,
    tokens: int,
    tuning: Tuning | None = ALL,
    gpu: Gpu = H200,
) -> list[str]:
    """The inline PTX of a whole step, as Triton is given it, each text as one line."""
    found: list[str] = []
    emit = backend.tt_dialect.elementwise_inline_asm

    def recorded(results: Any, text: str, **rest: Any) -> Any:
        found.append(" ".join(text.split()))
        return emit(results, text, **rest)

    with mock.patch.object(backend.tt_dialect, "elementwise_inline_asm", recorded):
        lower_step(config, batch, tokens, tuning, gpu)
    return found


# Bytes of a copy that are asked for into the L2 cache.
LEFT = r"min\.u32 (%%left\w*), \1, %d;"


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_with_activations_so_many_tiles_are_asked_for_as_the_tuning_says(tiles):
    found = texts(*STEPS["one sequence"], Tuning(collect_tiles=tiles))
    # By whole copies, where looks at words ask for 8 KB.
    assert sum(bool(re.search(LEFT % 65536, text)) for text in found) == tiles
    assert any(re.search(LEFT % 8192, text) for text in found)


A100 = Gpu.named("A100", "8.0", 108)
ON_GPUS = [*((name, H200) for name in STEPS), ("one sequence", A100), ("integers of several", A100)]
ON_GPUS.append(("2 tokens of several", A100))


@pytest.mark.parametrize(("name", "gpu"), ON_GPUS, ids=lambda x: getattr(x, "name", x))
def test_warps_are_whole_behind_every_jump_and_before_every_barrier(name, gpu):
    found = texts(*STEPS[name], ALL if gpu == H200 else None, gpu)
    assert any("cp.async.bulk" in text for text in found) == (gpu == H200)
    assert any("cp.async.mbarrier.arrive" in text for text in found) == (gpu == A100)
    jumps = [text for text in found if re.search(r"\bbra\b", text)]
    assert len(jumps) > 5
    for text in jumps:
        by_threads = re.sub(BY_WARPS, "", text)
        assert text.endswith(f"{REJOIN} }}") or not re.search(r"\bbra\b", by_threads), text[-200:]
    for text in found:
        for before in text.split("bar.sync 0;")[:-1]:
            assert before.endswith(f"{REJOIN} "), before[-200:]
    assert any("bar.sync 0;" in text for text in found)


def misread_choices(lower: Callable[[], None]) -> list[str]:
    """Choices between numbers that are lowered to something of another type."""
    found: list[str] = []
    rule = triton_lowering_rules[select_n_p]

    def checked(ctx: Any, *args: Any) -> Any:
        out = rule(ctx, *args)
        wanted = str(ctx.avals_out[0].dtype).replace("int", "i").replace("float", "f")
        if wanted in ("i32", "f32") and wanted not in str(out.type):
            found.append(f"{wanted} as {out.type}")
        return out

    with mock.patch.dict(triton_lowering_rules, {select_n_p: checked}):
        lower()
    return found


@pytest.mark.parametrize("name", STEPS)
def test_choices_between_numbers_are_lowered_to_numbers(name):
    assert misread_choices(lambda: lower_step(*STEPS[name])) == []


def test_a_choice_that_is_lowered_to_bits_is_noticed():
    def choose(x: Any, out: Any) -> None:
        out[0] = jnp.where(x[0] > 3, x[0], x[1])

    call = pl.pallas_call(
        choose,
        out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=1),
    )
    numbers = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert misread_choices(lambda: lower_for_gpu(call, numbers)) == []

    def condition(_ctx: Any, which: Any, *_cases: Any) -> Any:
        return which

    with mock.patch.dict(triton_lowering_rules, {select_n_p: condition}):
        found = misread_choices(lambda: lower_for_gpu(call, numbers))
    assert found == ["i32 as i1"]
