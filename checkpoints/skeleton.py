"""A model's arrays by name and shape, before any of them exists."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ffjax.config import ModelConfig
from ffjax.model import Transformer

__all__ = ["array_shapes", "flat", "nested", "quantized_arrays", "skeleton", "weights_of"]


def skeleton(config: ModelConfig, dtype: Any) -> Transformer:
    """A model with shapes in place of weights."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))


def weights_of(state: nnx.State) -> dict[str, Any]:
    """The arrays by the names of their attributes, nested: what Orbax is handed."""
    return nnx.to_pure_dict(state)


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names, as in "layers.qkv"."""
    return flatten_dict(tree, sep=".")


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return unflatten_dict(leaves, sep=".")


def array_shapes(config: ModelConfig, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of the configuration's model, by its dotted name."""
    return flat(weights_of(nnx.state(skeleton(config, dtype), nnx.Param)))


def quantized_arrays(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the integers and scales of the configuration's model, by dotted name."""
    names = {
        f"{'' if name == 'head' else 'layers.'}{name}{kind}"
        for name in config.weights.quantized
        for kind in ("", "_scale")
    }
    shapes = array_shapes(config, jnp.bfloat16) if names else {}
    return {name: leaf for name, leaf in shapes.items() if name in names}
