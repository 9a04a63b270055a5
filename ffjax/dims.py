"""The kernels' sizes of a step, from a model's configuration."""

from __future__ import annotations

from ffjax.config import ModelConfig
from pallas_kernels.dims import Dims

__all__ = ["step_dims"]


def step_dims(config: ModelConfig, batch: int, capacity: int) -> Dims:
    """The sizes of a decode step.

    Args:
        config: the model's.
        batch: B.
        capacity: S, slots of the cache.
    """
    c = config
    return Dims(
        batch=batch,
        vocab_size=c.vocab_size,
        num_layers=c.num_layers,
        model_dim=c.model_dim,
        ffw_dim=c.ffw_dim,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        capacity=capacity,
        norm_eps=c.norm_eps,
    )
