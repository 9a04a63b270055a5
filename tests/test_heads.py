"""Heads made wider by zeros: the same model, which the fused kernel takes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import filled_cache, random_model, random_tokens, small_config
from numerics import assert_close
from reference_cases import quick_jit
from step_cases import reference
from stream_cases import streamed

import ffjax
from ffjax.cache import KVCache
from ffjax.config import LongRopeScaling, ModelConfig
from ffjax.decode import why_not_fused_config
from ffjax.heads import widened_config
from ffjax.quantization import quantize
from pallas_kernels.gpu import Gpu

pytestmark = [
    pytest.mark.once(
        "The models that it makes are those of the other tests.",
        sample=["test_the_same_texts_have_the_same_logits[a part rotated, biases]"],
    ),
    pytest.mark.filterwarnings("error"),
]

LONG = LongRopeScaling(
    short_factors=(1.0,) * 18,
    long_factors=tuple(1 + i / 2 for i in range(18)),
    original_context=64,
    attention_factor=1.3,
)
CASES: dict[str, ModelConfig] = {
    # As Phi 3 mini.
    "heads of 96": small_config(head_dim=96, num_heads=2, num_kv_heads=2),
    "a part rotated, biases": small_config(
        head_dim=48, qkv_bias=True, rotary_pairs=18, rope_scaling=LONG, attn_scale=0.2
    ),
}


@quick_jit
def grow(model, tokens, cache):
    return model(tokens, cache)


@pytest.mark.parametrize("name", CASES)
def test_the_same_texts_have_the_same_logits(name):
    """In float32, where sums alone differ by their order."""
    config = CASES[name]
    model = ffjax.quantization.dequantize(random_model(config), "float32")
    wide = ffjax.widen_heads(model)
    assert wide.config.head_dim in (64, 128)
    tokens = random_tokens(config, 2, tokens=20)
    made = [
        grow(each, tokens, KVCache.create(each.config, 2, 24, jnp.float32))[0]
        for each in (model, wide)
    ]
    np.testing.assert_allclose(made[1], made[0], atol=2e-5 * float(jnp.abs(made[0]).max()))


def test_the_kernel_takes_it_and_computes_the_same():
    config = CASES["a part rotated, biases"]
    model, lengths = random_model(config), [39, 70, 0]
    wide = ffjax.widen_heads(model)
    cache, tokens = filled_cache(config, lengths, 80, dead=0.0), random_tokens(config, 3)

    def widened(heads):
        """Keys or values `[L, B, K, S, H]` as the wide model has them."""
        halves = heads.reshape(*heads.shape[:-1], 2, -1)
        return jnp.pad(halves, [(0, 0)] * 5 + [(0, 8)]).reshape(*heads.shape[:-1], 64)

    want = reference(model, cache, tokens)
    own = KVCache.create(wide.config, 3, 80)
    own = dataclasses.replace(own, k=widened(cache.k), v=widened(cache.v), lengths=cache.lengths)
    logits, _, after = streamed(wide, own, tokens)
    assert_close(logits, want.logits, "fused_vs_model")
    zeros = np.asarray(after.k).reshape(*after.k.shape[:-1], 2, 32)[..., 24:]
    assert not zeros.any()


def test_what_is_not_widened_is_shared():
    model = random_model(CASES["heads of 96"])
    wide = ffjax.widen_heads(model)
    assert model.config.head_dim == 96
    for name in ("gate_up", "down", "attn_norm"):
        theirs, ours = (getattr(each.layers, name)[...] for each in (model, wide))
        assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer(), name
    assert wide.layers.attn_out[...].shape == (2, 144, 256)


def test_the_sentence_of_the_kernel_names_it(monkeypatch):
    monkeypatch.setattr(Gpu, "of", lambda device: Gpu.named("H100", "9.0", 132))
    config = CASES["heads of 96"]
    reason = why_not_fused_config(config, jnp.bfloat16, 1, 64)
    assert reason is not None
    assert "ffjax.widen_heads" in reason
    assert why_not_fused_config(widened_config(config), jnp.bfloat16, 1, 64) is None


@pytest.mark.parametrize(
    ("config", "head_dim", "kind", "match"),
    [
        (small_config(head_dim=256), None, ValueError, "have 256, got None"),
        (small_config(), 64, ValueError, "have 64, got 64. The fused kernel has heads of 32, 64"),
        (small_config(), 67, ValueError, "even number of elements: .* got 67"),
        (small_config(head_dim=48, qk_norm="head"), None, NotImplementedError, "qk_norm='head'"),
    ],
)
def test_what_cannot_be_widened_gets_a_sentence(config, head_dim, kind, match):
    with pytest.raises(kind, match=match):
        widened_config(config, head_dim)


def test_heads_are_made_wider_before_matrices_are_quantized():
    model = quantize(random_model(small_config(head_dim=48)), "int8")
    with pytest.raises(NotImplementedError, match=r"before matrices are quantized; .* are"):
        ffjax.widen_heads(model)
