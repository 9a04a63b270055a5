"""The packed prefill on a GPU against the reference's: every family, format and kind of chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import assert_close
from prefill_cases import CONFIGS, check, fed, model_of, prompts_of

from ffjax.benchmark.inputs import random_model
from ffjax.config import preset
from ffjax.generation import generate
from ffjax.prefill.packed import PackedPrefill
from ffjax.prefill.padded import PaddedPrefill
from ffjax.prefill.stepwise import StepwisePrefill
from ffjax.streaming import stream
from pallas_kernels.prefill import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

FAMILIES = [name for name, config in CONFIGS.items() if not config.weights.quantized]
# One chunk that is full and ends within a prompt, and one that is not; windows are far shorter.
LONG = (2100, 70, 1, 333)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [LONG, (90, 7), (30, 3)], ids=str)
def test_it_rounds_as_the_reference_does(name, lengths):
    check(name, "bfloat16", lengths, 2304)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_leaves_the_references_keys_and_values(name):
    got, want = check(name, "float32", LONG, 2304)
    assert got.token == want.token


@pytest.mark.parametrize("name", ["olmo3", "llama", "gemma3"])
def test_it_is_as_close_to_float32_as_the_reference(name):
    model = model_of(name, "bfloat16")
    prompts = prompts_of(model.config, LONG)
    graph, params = nnx.split(model)
    exact = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    kinds = {"packed": PackedPrefill, "padded": PaddedPrefill}
    found = {name: fed(kind, model, prompts, 2304) for name, kind in kinds.items()}
    wanted = fed(PaddedPrefill, exact, prompts, 2304)
    for kept in ("k", "v"):
        keys = wanted.live(kept)
        far = {name: np.linalg.norm(x.live(kept) - keys) for name, x in found.items()}
        assert 0 < far["packed"] <= 1.05 * far["padded"] < 0.02 * np.linalg.norm(keys)


@pytest.mark.parametrize("name", ["llama", "gemma2", "int4"])
def test_two_runs_are_bit_equal(name):
    model = model_of(name, "bfloat16")
    prompts = prompts_of(model.config, LONG)
    first, second = (fed(PackedPrefill, model, prompts, 2304) for _ in range(2))
    for kept in ("k", "v"):
        assert first.live(kept).tobytes() == second.live(kept).tobytes()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [attention.EVERYTHING, 1000])
def test_attention_over_a_long_cache(head_dim, softcap, window):
    """With scores that matter: a few keys have most of the weight."""
    past, new, heads, groups = 5000, 300, 8, 2
    size = past + new
    keys = jax.random.split(jax.random.key(head_dim), 3)
    q = 3 * jax.random.normal(keys[0], (new, heads, head_dim))
    k, v = (jax.random.normal(key, (1, 1, groups, size + 9, head_dim)) for key in keys[1:])
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    k, v = (x.at[:, :, :, size:].set(jnp.nan) for x in (k, v))
    blocks = attention.blocks_for(head_dim, 2, 99 * 1024, new)
    count = attention.tiles_for(new, 1, blocks.queries)
    tiles = attention.cut([(0, new, past)], blocks.queries, count)
    got = attention.attend(
        q, k, v, jnp.asarray(tiles), jnp.int32(0), window, blocks=blocks, softcap=softcap
    )
    behind = (past + np.arange(new))[:, None] - np.arange(size)
    seen = (behind >= 0) & (behind < window)
    each = heads // groups
    with jax.default_matmul_precision("highest"):
        k32, v32 = (x[0, 0, :, :size].astype(jnp.float32).repeat(each, axis=0) for x in (k, v))
        scores = jnp.einsum("tnh,nsh->nts", q.astype(jnp.float32), k32) / head_dim**0.5
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        want = jnp.einsum("nts,nsh->tnh", weights, v32)
    assert_close(got, want, "rounded")


def test_a_long_prompt_needs_no_more_memory_than_a_full_chunk():
    model = random_model(preset("llama3.2-1b"))
    used = []
    for length in (2048, 8192):
        prompts = prompts_of(model.config, (length,))
        used.append(fed(PackedPrefill, model, prompts, 8448).temp_bytes)
    assert used[0] == used[1] < 200e6


@pytest.mark.parametrize("lengths", [(1,), (16,), (23,), (3, 8), (4, 1, 7)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "int4"])
def test_short_prompts_by_decode_steps(name, lengths):
    model = model_of(name, "bfloat16")
    prompts = prompts_of(model.config, lengths)
    got = fed(StepwisePrefill, model, prompts, 64, fill=np.nan)
    want = fed(PaddedPrefill, model, prompts, 64)
    assert got.cache.lengths.tolist() == list(lengths)
    for kept in ("k", "v"):
        assert_close(got.live(kept), want.live(kept), "packed_vs_padded_bfloat16")


def test_generate_and_stream_feed_short_prompts_by_decode_steps():
    model = model_of("llama", "bfloat16")
    prompts = [row.tolist() for row in prompts_of(model.config, (7, 3))]
    whole = generate(model, prompts, 20, prefill="steps")
    assert (whole.prefill, whole.implementation) == ("steps", "pallas")
    steps = stream(model, prompts, 20, prefill="steps")
    assert [list(row) for row in zip(*steps, strict=True)] == whole.tokens
    assert steps.output.prefill == "steps"


def test_generate_and_stream_take_it_unasked():
    model = model_of("llama", "bfloat16")
    prompts = [row.tolist() for row in prompts_of(model.config, (40, 3))]
    whole = generate(model, prompts, 20)
    assert (whole.prefill, whole.implementation) == ("pallas", "pallas")
    assert generate(model, prompts, 20, implementation="xla").prefill == "xla"
    steps = stream(model, prompts, 20)
    assert [list(row) for row in zip(*steps, strict=True)] == whole.tokens
    assert steps.output.prefill == "pallas"
