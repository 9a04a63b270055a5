"""What the tests of `ffjax bench` measure: a model that is small and like no other."""

import dataclasses

from ffjax.config import ModelConfig

__all__ = ["CONFIG", "FAMILY", "PNG"]

PNG = b"\x89PNG\r\n\x1a\n"
# No two sizes are the same, and none of its arrays but stacked ones has a size of 3.
CONFIG = ModelConfig(
    name="tiny",
    vocab_size=101,
    num_layers=3,
    model_dim=48,
    ffw_dim=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-2,
    max_context=300,
)
# Nothing in it is as in Llama; the cache of its local layer is a ring of 256 slots.
FAMILY = dataclasses.replace(
    CONFIG,
    name="tiny-family",
    norm_offset=1.0,
    post_norm=True,
    qk_norm="head",
    qkv_bias=True,
    activation="gelu_tanh",
    embed_scale=2.0,
    residual_scale=0.5,
    attn_scale=0.5,
    logit_scale=0.5,
    attn_softcap=3.0,
    logit_softcap=2.0,
    window=7,
    window_pattern=(True, False),
    rope_theta_local=100.0,
    tied_embeddings=True,
    max_context=500,
)
