"""The fused kernel on a GPU: at the sizes of real models, against the reference."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of, filled_cache, random_model, small_config
from flax import nnx
from numerics import TOLERANCES, assert_close, assert_same_choice
from quantize_cases import FOR_KERNELS, kernel_config
from step_cases import CASES

from checkpoints.store import SHIPPED_MODEL, load
from ffjax import fidelity
from ffjax.cache import KVCache
from ffjax.config import PRESETS, ModelConfig, preset
from ffjax.decode import DecodeOutput, Implementation, Kernel, decode_step
from ffjax.formats import INT8, WeightFormats, int4
from ffjax.generation import generate
from ffjax.model import Transformer
from ffjax.quantization import quantized_config
from ffjax.tokenizer import ByteTokenizer
from pallas_kernels.gpu import Gpu
from pallas_kernels.stream.launch import layout_of
from pallas_kernels.stream.planner import make_stream_plan

pytestmark = [
    pytest.mark.gpu,
    # JAX 0.11 says so of every kernel of this backend; the project pins the versions that have it.
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

CAPACITY = 16_384
F32 = jnp.float32
# The first; around the edge of a tile of keys; far; nearly full.
POSITIONS = (1, 127, 128, 129, 4096, 16_000)
STEPS = 1000

every_kernel = pytest.mark.parametrize("kernel", get_args(Kernel))


class Split(NamedTuple):
    """A model in the parts that jit takes: its structure, static, and its arrays."""

    config: ModelConfig
    graph: Any
    params: Any


def made_on_the_device(config: ModelConfig) -> Iterator[Split]:
    # Not the cached one: nothing may hold 16 GB of weights after the last test with them.
    split = Split(config, *nnx.split(random_model.__wrapped__(config)))
    yield split
    for array in jax.tree.leaves(split.params):
        array.delete()


@pytest.fixture(scope="module", params=["llama3.2-1b", "llama3.1-8b"])
def model(request) -> Iterator[Split]:
    """Random weights of a real model's shapes, made on the device; one model at a time."""
    yield from made_on_the_device(preset(request.param))


# Larger ones have tests of a few layers, see `test_gpu_presets`: several processes share a GPU.
OTHERS = [n for n, c in PRESETS.items() if c.family != "llama" and c.num_params < 3.5e9]


@pytest.fixture(scope="module", params=OTHERS)
def family(request) -> Iterator[Split]:
    """The same for every family besides Llama."""
    yield from made_on_the_device(preset(request.param))


QUANTIZED = {
    "int8": WeightFormats.of_layers(INT8),
    "int4": WeightFormats.of_layers(int4()),
    "int4 and its head": WeightFormats.of_layers(int4(), int4()),
    "int8, and a head of int4": WeightFormats.of_layers(INT8, int4()),
}


@pytest.fixture(scope="module", params=QUANTIZED)
def formats(request) -> WeightFormats:
    return QUANTIZED[request.param]


@pytest.fixture(scope="module", params=["llama3.2-1b", "llama3.1-8b"])
def quantized(request, formats) -> Iterator[Split]:
    """The same of random integers with scales."""
    yield from made_on_the_device(quantized_config(preset(request.param), formats))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def one_step(
    implementation: Implementation, graph, params, cache: KVCache, tokens: jax.Array
) -> DecodeOutput:
    model = nnx.merge(graph, params)
    return decode_step(model, cache, tokens, implementation=implementation)


def mixed_lengths(batch: int) -> list[list[int]]:
    """Every position in every row once, and different ones within a batch."""
    count = len(POSITIONS)
    return [[POSITIONS[(i + b) % count] for b in range(batch)] for i in range(count)]


def newest(cache: KVCache) -> np.ndarray:
    """Keys and values of each sequence's newest position: `[2, B, L, K, H]`."""
    row, slot = jnp.arange(cache.batch), cache.lengths - 1
    return np.asarray(jnp.stack([x[:, row, :, slot] for x in (cache.k, cache.v)]))


def maps_begin(config: ModelConfig, batch: int, capacity: int) -> int:
    """How many of a cache's counters come before the tensor maps."""
    gpu = Gpu.of(jax.devices()[0])
    assert gpu is not None
    return layout_of(make_stream_plan(dims_of(config, batch, capacity), gpu)).maps


def exact(split: Split) -> Split:
    """The reference in float32: its roundings are those of a test's tolerance no longer."""
    model = fidelity.upcast(nnx.merge(split.graph, split.params))
    return Split(model.config, *nnx.split(model))


def run_both(kernel, config, graph, params, lengths, capacity, oracle: Split | None = None):
    """A step by the kernel, by the kernel again, and by the reference, each on a fresh cache.

    Args:
        kernel: that of the implementations.
        config: the model's.
        graph: its structure.
        params: its arrays.
        lengths: of the sequences in the cache.
        capacity: of the cache.
        oracle: the same model as the reference is to run it; None: as the kernel does.

    Yields of each: logits, token, the newest keys and values, lengths, and the counters but for
    the tensor maps, which say where the cache lies.
    """
    batch = len(lengths)
    tokens = jax.random.randint(jax.random.key(batch), (batch,), 0, config.vocab_size)
    ours = Split(config, graph, params)
    runs: tuple[tuple[Implementation, Split], ...] = (
        (kernel, ours),
        (kernel, ours),
        ("xla", oracle or ours),
    )
    for name, split in runs:
        cache = filled_cache(config, lengths, capacity)  # NaN where nobody may read
        if split is oracle:
            cache = dataclasses.replace(cache, k=cache.k.astype(F32), v=cache.v.astype(F32))
        with jax.default_matmul_precision("highest"):
            out = one_step(name, split.graph, split.params, cache, tokens)
        counters = out.cache.counters[: maps_begin(config, batch, capacity)]
        small = out.logits, out.token, newest(out.cache), out.cache.lengths, counters
        seen = [np.asarray(x) for x in small]
        # The largest caches have 17 GB: one is freed before the next is made.
        del cache, out, small
        yield seen


def check_step(
    kernel, config, graph, params, lengths, capacity, tolerance, oracle: Split | None = None
):
    got, again, want = run_both(kernel, config, graph, params, lengths, capacity, oracle)
    assert [x.tobytes() for x in got] == [x.tobytes() for x in again], lengths
    logits, token, appended, new_lengths, _ = got
    assert_close(logits, want[0], tolerance)
    assert_same_choice(logits, want[0], tolerance)
    assert token.tolist() == logits.argmax(axis=-1).tolist()
    assert_close(appended, want[2], tolerance)
    assert new_lengths.tolist() == [n + 1 for n in lengths]


@every_kernel
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_a_small_odd_model_matches_the_reference(name, kernel):
    config, capacity, all_lengths = CASES[name]
    graph, params = nnx.split(random_model(config))
    for lengths in all_lengths:
        check_step(kernel, config, graph, params, lengths, capacity, "fused_vs_model")


@every_kernel
def test_a_full_cache_leaves_its_neighbours_alone(kernel):
    """Interpreted, a store beyond an array is dropped; here it would hit the next head."""
    config = small_config(num_heads=4, num_kv_heads=2)
    graph, params = nnx.split(random_model(config))
    tokens = jnp.array([3, 1, 4], jnp.int32)
    lengths = [64, 5, 65]
    before = filled_cache(config, lengths, 64)
    kept = [np.asarray(x) for x in (before.k, before.v)]
    out = one_step(kernel, graph, params, before, tokens)
    assert np.isnan(out.logits).any(axis=1).tolist() == [True, False, True]
    for new, old in zip((out.cache.k, out.cache.v), kept, strict=True):
        new = np.array(new)
        new[:, 1, :, 5] = old[:, 1, :, 5]
        assert new.tobytes() == old.tobytes()
    assert out.cache.lengths.tolist() == [65, 6, 66]


@every_kernel
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_step_matches_the_reference(model, batch, kernel):
    for lengths in mixed_lengths(batch):
        parts = model.config, model.graph, model.params
        check_step(kernel, *parts, lengths, CAPACITY, "fused_vs_model_deep")


@every_kernel
@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_of_quantized_weights_matches_the_reference(quantized, batch, kernel):
    for lengths in mixed_lengths(batch):
        parts = quantized.config, quantized.graph, quantized.params
        check_step(kernel, *parts, lengths, CAPACITY, "fused_vs_model_deep")


@every_kernel
@pytest.mark.parametrize("name", FOR_KERNELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_small_quantized_weights_matches_the_reference(name, batch, kernel):
    config = kernel_config(FOR_KERNELS[name])
    graph, params = nnx.split(random_model(config))
    lengths = [65, 0, 129][:batch]
    check_step(kernel, config, graph, params, lengths, 150, "fused_vs_model")


@every_kernel
@pytest.mark.parametrize("batch", [1, 4])
def test_a_step_of_every_family_matches_the_reference(family, batch, kernel):
    """Before the window, at its edge, and beyond it, where the model has one."""
    window = family.config.window or 512
    ends = (1, 127, window - 1, window, window + 900)
    lengths = [[ends[(i + b) % len(ends)] for b in range(batch)] for i in range(len(ends))]
    for some in lengths:
        parts = family.config, family.graph, family.params
        check_step(kernel, *parts, some, window + 1024, "fused_vs_model_deep")


@every_kernel
def test_a_thousand_steps_in_a_row(model, kernel):
    batch, starts = 3, [0, 100, CAPACITY - STEPS]

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def run(graph, params, cache, tokens):
        model = nnx.merge(graph, params)

        def step(carry, _):
            cache, tokens, finite = carry
            out = decode_step(model, cache, tokens, implementation=kernel)
            finite &= jnp.isfinite(out.logits).all()
            return (out.cache, out.token, finite), out.token

        carry = (cache, tokens, jnp.bool_(True))
        (cache, _, finite), made = jax.lax.scan(step, carry, length=STEPS)
        return cache, made, finite

    made = []
    for _ in range(2):
        cache = filled_cache(model.config, starts, CAPACITY)
        first = jnp.arange(batch, dtype=jnp.int32)
        cache, tokens, finite = run(model.graph, model.params, cache, first)
        assert finite
        assert cache.lengths.tolist() == [n + STEPS for n in starts]
        made.append(np.asarray(tokens))
    assert made[0].shape == (STEPS, batch)
    np.testing.assert_array_equal(made[0], made[1])


@every_kernel
@pytest.mark.parametrize("batch", [1, 8])
def test_a_compiled_step_is_one_kernel_and_copies_nothing(model, batch, kernel):
    cache = jax.eval_shape(lambda: KVCache.create(model.config, batch, CAPACITY))
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    lowered = one_step.lower(kernel, model.graph, model.params, cache, tokens)
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    [entry] = re.findall(r"^ENTRY [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    kinds = re.findall(r"^\s+(?:ROOT )?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", entry, re.MULTILINE)
    # What is left out here runs nothing on the GPU.
    idle = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
    assert [kind for kind in kinds if kind not in idle] == ["custom-call"]
    # Scratch alone; the cache is updated in place.
    assert memory.temp_size_in_bytes < 8 * 2**20
    dims = dims_of(model.config, batch, CAPACITY)
    assert memory.alias_size_in_bytes >= dims.cache_bytes([CAPACITY] * batch)


PROMPTS = (
    "import os\nimport sys\n",
    "def main():\n",
    "class TestCase(unittest.TestCase):\n    def setUp(self):\n",
    "    for i in range(",
    "if __name__ == ",
    "try:\n    import json\nexcept ImportError:\n",
    "    return self._",
    '"""Utilities for ',
    "from collections import ",
    "# This module implements",
    "    def __init__(self, name, value=None):\n",
    "with open(filename, 'rb') as f:\n    data = ",
    "    raise ValueError(",
    "x",
    "assert isinstance(",
    "    while True:\n        line = ",
    "lambda x: ",
    "@property\n    def ",
    "    elif isinstance(obj, ",
    "print(f'{",
    "async def read(self, n=-1):\n",
    "logging.getLogger(__name__)",
    "    yield from ",
    "0123456789" * 15,
)


@every_kernel
@pytest.mark.parametrize("batch", [1, 8])
def test_the_shipped_model_says_the_same_both_ways(batch, kernel):
    model = load(SHIPPED_MODEL)
    prompts = [ByteTokenizer().encode(text) for text in PROMPTS]
    assert len(prompts) >= 20
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        fused, plain = (
            generate(model, some, max_new_tokens=100, capacity=512, implementation=name)
            for name in (kernel, "xla")
        )
        assert (fused.implementation, plain.implementation) == (kernel, "xla")
        for prompt, ours, theirs in zip(some, fused.tokens, plain.tokens, strict=True):
            if ours != theirs:
                check_near_tie(model, prompt, ours, theirs)


def check_near_tie(model: Transformer, prompt: list[int], ours: list[int], theirs: list[int]):
    """Where two generations part, the reference must hardly tell their tokens apart."""
    same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    logits = model(jnp.array([prompt + theirs[:same]]))
    assert isinstance(logits, jax.Array)
    logits = np.asarray(logits[0, -1], np.float64)
    rms = np.sqrt(np.mean(logits**2))
    gap = abs(logits[theirs[same]] - logits[ours[same]])
    best = logits.max() - max(logits[theirs[same]], logits[ours[same]])
    allowed = 2 * TOLERANCES["fused_vs_model"].worst * rms
    assert gap <= allowed, f"after {prompt} and {theirs[:same]}: {gap} apart, {allowed} allowed"
    assert best <= allowed
