"""Quantizes a model: its matrices become integers with scales."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ffjax.calibration import Calibration, calibrated_arrays
from ffjax.config import ModelConfig
from ffjax.formats import (
    DEFAULT_GROUP,
    FLOATING,
    INT8,
    Offset,
    ScaleType,
    WeightFormat,
    WeightFormats,
    int4,
)
from ffjax.model import Transformer
from ffjax.rounding import all_finite, expand, not_finite, round_matrix
from ffjax.settings import own_settings

__all__ = ["Kind", "dequantize", "named_format", "named_formats", "quantize", "quantized_config"]

Kind = Literal["int8", "int4"]


def named_format(
    kind: str,
    group_size: int = DEFAULT_GROUP,
    scale_dtype: ScaleType = "bfloat16",
    offset: Offset | None = None,
) -> WeightFormat:
    """The format of that name.

    Args:
        kind: "int8" or "int4".
        group_size: of int4: 32, 64 or 128. int8 has no groups by that name: neither this nor what
            follows is looked at.
        scale_dtype: of int4: "bfloat16" or "float16".
        offset: of int4: "zero", "minimum" or None; see `WeightFormat`.

    Raises:
        ValueError: there is no format of that name, or no group, scale or offset as asked for.
    """
    if kind not in get_args(Kind):
        names = " or ".join(map(repr, get_args(Kind)))
        raise ValueError(f"Weights are quantized to {names}, got {kind!r}.")
    return INT8 if kind == "int8" else int4(group_size, scale_dtype, offset)


def named_formats(
    weights: Kind,
    group_size: int = DEFAULT_GROUP,
    head: Kind | None = None,
    offset: Offset | None = None,
) -> WeightFormats:
    """The formats of a model's matrices, by name: what `quantize` takes.

    Raises:
        ValueError: there is no format of that name, or no group or offset as asked for.
    """
    asked = group_size, "bfloat16", offset
    of_head = None if head is None else named_format(head, *asked)
    return WeightFormats.of_layers(named_format(weights, *asked), of_head)


def quantized_config(config: ModelConfig, formats: WeightFormats) -> ModelConfig:
    """The configuration of a model whose matrices have these formats.

    Args:
        config: of the model before it is quantized.
        formats: of its matrices. Where they name one of the head, a tied head becomes an array of
            its own.

    Raises:
        ValueError: it is quantized already; inputs are not whole groups.
    """
    if config.weights.quantized:
        raise ValueError(
            f"Weights are rounded once, and those of {config.name} are quantized already "
            f"({config.weights}). Start from the model that they were made of."
        )
    tied = config.tied_embeddings and formats.head is None
    return dataclasses.replace(config, weights=formats, tied_embeddings=tied)


@own_settings()
def quantize(
    model: Transformer,
    weights: Kind | WeightFormats,
    group_size: int = DEFAULT_GROUP,
    *,
    head: Kind | None = None,
    offset: Offset | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transformer:
    """A model whose matrices are integers with scales: half or a quarter of the bytes.

    It is a model like any other: the reference runs it, `ffjax.save` keeps it, and
    `model.config.weights` says what its arrays are. Embedding, norms and biases stay as they
    are and are shared with the model that was given; what is quantized is not, and is freed
    with that model.

    Args:
        model: the model.
        weights: "int8" or "int4", for all matrices of the layers; or a format for each matrix,
            None for those to be left as they are.
        group_size: of "int4": the inputs that share a scale, 32, 64 or 128.
        head: the format of the head, where `weights` is a name; None: it stays as it is. A
            step reads the whole head, so that it pays for large vocabularies. A tied head
            becomes an array of its own then, quantized, beside the embedding, and the
            configuration says that they are not tied.
        offset: of "int4": "minimum" has the integers of each group cover the range of its weights,
            from a minimum that is stored beside the scale, and "zero" from an integer that stands
            for 0. Two bytes more a group; None: -8 to 7 scales, either way round.
        calibration: sequences of tokens that the reference reads, layer by layer. Weights are
            rounded such that products with what it then computes change least, rather than the
            weights themselves. None: each weight becomes the nearest number there is. On the
            device are, beside both models, a layer's activations of `calibration.batch` sequences
            and, for a matrix `[out, in]`, some 6 * in^2 + 6 * in * out numbers of float32; on the
            host n * T * D of them, twice as many where weights catch up.
        progress: is told, after each matrix, or with calibration each layer's, how many bytes of
            them were read and of how many.

    Returns:
        A model of integers, int8 or packed in uint32 (`ffjax.packing`), and scales beside them,
        on the same device.

    Raises:
        ValueError: there is no such format; inputs are not whole groups; a matrix is quantized
            already, or holds what is not finite; so does what it takes of the calibration's tokens,
            or the model does not know one of them.
        TypeError: head or offset is given beside formats, which say it themselves.
    """
    if isinstance(weights, WeightFormats):
        if head is not None:
            raise TypeError(
                f"WeightFormats says the head's format itself; head={head!r} was given beside it. "
                "Leave one of them out."
            )
        if offset is not None:
            raise TypeError(
                f"WeightFormats says of each format whether it has an offset; offset={offset!r} "
                "was given beside it. Leave one of them out."
            )
        formats = weights
    else:
        formats = named_formats(weights, group_size, head, offset)
    config = quantized_config(model.config, formats)
    arrays = _arrays(model)
    if formats.head is not None:
        arrays["head"] = model.head_weight
    places = {_place(name): value for name, value in formats.quantized.items()}
    total, read = sum(arrays[place].nbytes for place in places), 0

    def done(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress is not None:
            progress(read, total)

    for place in places:
        if not all_finite(arrays[place]):
            raise not_finite(f"{place} of {config.name}")
    if calibration is not None:
        arrays |= calibrated_arrays(model, config, calibration, done)
        return _assembled(config, model.dtype, arrays)
    for place, value in places.items():
        source = arrays[place]
        arrays[place], arrays[f"{place}_scale"] = _round(source, value)
        done(source.nbytes)
    return _assembled(config, model.dtype, arrays)


@own_settings()
def dequantize(model: Transformer, dtype: Any = None) -> Transformer:
    """The model with the weights that its integers and scales stand for.

    Each is the product of an integer and a scale, perhaps with a minimum added, computed in
    float32, then rounded to the dtype. The float32 model is what a quantized one is to be compared
    with: there products of groups are exact, and those of int8 rows and sums with minima off by
    2^-24 of themselves at most.

    Args:
        model: a model, also one of which nothing is quantized.
        dtype: of all weights, bfloat16 or float32; None: that of the model.

    Returns:
        A model of which nothing is quantized.
    """
    config, dtype = model.config, jnp.dtype(dtype or model.dtype)
    arrays = _arrays(model)
    for name, value in config.weights.quantized.items():
        place = _place(name)
        arrays[place] = _expand(arrays[place], arrays.pop(f"{place}_scale"), value, dtype)
    arrays = {place: array.astype(dtype) for place, array in arrays.items()}
    return _assembled(dataclasses.replace(config, weights=FLOATING), dtype, arrays)


def _place(name: str) -> str:
    """A matrix's dotted name in the model."""
    return name if name == "head" else f"layers.{name}"


def _arrays(model: Transformer) -> dict[str, Array]:
    """The model's arrays by their dotted names."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): param[...] for path, param in flat}


def _assembled(config: ModelConfig, dtype: Any, arrays: dict[str, Array]) -> Transformer:
    """The configuration's model of these arrays, by dotted name."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert {".".join(map(str, path)) for path, _ in flat} == arrays.keys()
    for path, param in flat:
        array = arrays[".".join(map(str, path))]
        assert (array.shape, array.dtype) == (param.shape, param.dtype), path
        param.set_value(array)
    nnx.update(model, nnx.from_flat_state(flat))
    return model


@functools.partial(jax.jit, static_argnames="format")
def _round(weight: Array, format: WeightFormat) -> tuple[Array, Array]:
    """Of `[out, in]`, or `[L, out, in]`: a layer at a time, which is what float32 copies take."""
    if weight.ndim == 2:
        return round_matrix(weight, format)
    return lax.map(lambda matrix: round_matrix(matrix, format), weight)


@functools.partial(jax.jit, static_argnames=("format", "dtype"))
def _expand(integers: Array, scale: Array, format: WeightFormat, dtype: Any) -> Array:
    return expand(integers, scale, format, dtype)
