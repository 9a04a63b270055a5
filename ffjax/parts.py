"""A model taken apart, as programs take it."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

from ffjax.config import ModelConfig
from ffjax.decode import device_of
from ffjax.model import Transformer

__all__ = ["Parts"]


class Parts(NamedTuple):
    """A model's structure and its arrays, and what is asked of it often.

    Attributes:
        graphdef: the structure; static.
        state: the arrays, a pytree.
        config: the model's.
        dtype: of weights that are not quantized.
        device: that the weights are on.
    """

    graphdef: Any
    state: Any
    config: ModelConfig
    dtype: Any
    device: Any

    @classmethod
    def of(cls, model: Transformer) -> Parts:
        """Takes a model apart."""
        return cls(*nnx.split(model), model.config, model.dtype, device_of(model))
