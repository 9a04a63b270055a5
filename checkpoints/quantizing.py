"""Rounds a model's matrices to integers while it goes from one file to another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax import Array

from checkpoints.blocks import Block
from checkpoints.skeleton import array_shapes
from ffjax.config import ModelConfig
from ffjax.formats import WeightFormat
from ffjax.rounding import all_finite, not_finite, round_matrix

__all__ = ["quantized_blocks"]

# Weights that are rounded at a time: on the device are some ten float32 copies of them.
_PIECE = 1 << 24


def quantized_blocks(
    before: ModelConfig,
    after: ModelConfig,
    blocks: Iterable[Block],
    dtype: np.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Block]:
    """The blocks of a quantized model, made of those of the model before.

    The numbers are those of `ffjax.quantize`: rows are rounded each by itself, some at a time, on
    the default device.

    Args:
        before: the configuration of the model that there is.
        after: that of the one to be made: `ffjax.quantization.quantized_config`.
        blocks: of the model that there is.
        dtype: of its weights.
        progress: is told, after each block of a matrix, how many bytes of them were read and of
            how many.

    Raises:
        ValueError: inputs are not whole groups; a matrix holds what is not finite.
    """
    formats = {
        "head" if name == "head" else f"layers.{name}": value
        for name, value in after.weights.quantized.items()
    }
    # A tied head that is quantized is an array of its own beside the embedding.
    tied = before.tied_embeddings and "head" in formats
    leaves = array_shapes(before, dtype)
    sources = {name: leaves["embed" if tied and name == "head" else name] for name in formats}
    for name, value in formats.items():
        if (reason := value.why_not(sources[name].shape[-1])) is not None:
            raise ValueError(reason)
    total, read = sum(leaf.size * leaf.dtype.itemsize for leaf in sources.values()), 0
    for block in blocks:
        name, start, numbers = block
        del block
        if name not in formats:
            yield Block(name, start, numbers)
        if tied and name == "embed":
            name = "head"
        if (format := formats.get(name)) is not None:
            integers, scale = _rounded(numbers, format, f"{name} of {after.name}")
            read += numbers.nbytes
            del numbers
            yield Block(name, start, integers)
            del integers
            yield Block(f"{name}_scale", start, scale)
            if progress is not None:
                progress(read, total)


def _rounded(numbers: np.ndarray, format: WeightFormat, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of matrices `[..., out, in]`.

    Args:
        numbers: the matrices, on the host.
        format: what to round to.
        what: they are, for messages.

    Raises:
        ValueError: some are not finite.
    """
    matrix = numbers.reshape(-1, numbers.shape[-1])
    step = max(1, _PIECE // matrix.shape[-1])
    pieces = -(-len(matrix) // step)
    made: list[list[np.ndarray]] = []
    under_way: tuple[Array, Array, Array] | None = None
    for piece in range(pieces + 1):
        now = None
        if piece < pieces:
            # Of one size, or nearly: each size is a program of its own.
            rows = slice(len(matrix) * piece // pieces, len(matrix) * (piece + 1) // pieces)
            now = _round(jax.device_put(matrix[rows]), format)
        if under_way is not None:  # it comes back while the next is rounded
            finite, *results = under_way
            if not finite:
                raise not_finite(what)
            made.append([np.asarray(result) for result in results])
        under_way = now
    integers, scale = (np.concatenate(parts) for parts in zip(*made, strict=True))
    *leading, out, _ = numbers.shape
    return (
        integers.reshape(*leading, out, integers.shape[-1]),
        scale.reshape(*leading, out, *scale.shape[1:]),
    )


@functools.partial(jax.jit, static_argnames="format")
def _round(matrix: Array, format: WeightFormat) -> tuple[Array, Array, Array]:
    """Whether the matrix `[out, in]` is finite, and its integers and scales."""
    return all_finite(matrix), *round_matrix(matrix, format)
