"""FP8's layouts, which are made whole: float8_e4m3 with a scale a tensor, row, or square.

Of a matrix X `[out, in]` (the quantizer "fp8" of https://github.com/huggingface/transformers, and
"float-quantized" of https://github.com/vllm-project/compressed-tensors): X.weight, float8_e4m3fn;
and X.weight_scale, of one number or `[out, 1]`, or X.weight_scale_inv `[out / a, in / b]`, one for
each square of weight_block_size `[a, b]`. A weight is their product, whichever the name.

No format of ours has such numbers: int8 with a scale a row has as many bytes, and more bits.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from checkpoints.hf_files import StoredTensor
from checkpoints.hf_integers import Settings, raw
from checkpoints.integers import row_blocks
from checkpoints.manifest import CheckpointError
from checkpoints.stored import ALL

__all__ = ["FloatMatrix", "read_fp8"]

_NOT_OURS = ("_scale", "_scale_inv")
# Of activations: what they are multiplied with is not looked at.
_BESIDE = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".activation_scale")


@dataclasses.dataclass(frozen=True)
class FloatMatrix:
    """A matrix of float8 with scales, made whole where it is read; as `stored.Stored`.

    Attributes:
        weight: its numbers.
        scale: what multiplies them.
        square: rows and inputs that share a scale; None: one a row, or one for all.
    """

    weight: StoredTensor
    scale: StoredTensor
    square: tuple[int, int] | None

    @property
    def name(self) -> str:
        """Its name there."""
        return self.weight.name

    @property
    def dtype(self) -> str:
        """What its numbers are called."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """`[out, in]`."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """How many bytes of the file it takes."""
        return self.weight.nbytes + self.scale.nbytes

    def parts(self) -> list[slice]:
        """The matrix is read at once."""
        return [ALL]

    def read_into(self, out: np.ndarray, part: slice = ALL) -> None:
        """Reads it: the products, computed in float32, rounded to the array's dtype."""
        weight, scale, out = raw(self.weight), raw(self.scale).astype(np.float32), out[part]
        if self.square is None:
            scale = np.broadcast_to(scale.reshape(-1, 1), (len(weight), 1))
        for rows in row_blocks(*weight.shape):
            of_rows = scale[rows] if self.square is None else self._of_squares(scale, rows)
            out[rows] = weight[rows].astype(np.float32) * of_rows

    def _of_squares(self, scale: np.ndarray, rows: slice) -> np.ndarray:
        """The scale of each number of some rows, of scales of squares."""
        assert self.square is not None
        height, inputs = self.square
        which = np.arange(self.shape[0])[rows] // height
        return scale[which].repeat(inputs, axis=1)[:, : self.shape[1]]


def read_fp8(settings: Settings, tensors: dict[str, StoredTensor]) -> dict:
    """Puts whole matrices in the place of those of float8; there are no integers to return.

    Raises:
        CheckpointError: a matrix has no scale, or one of another shape.
    """
    block = settings.fields.get("weight_block_size")
    square = None if block is None else (int(block[0]), int(block[1]))
    for name in [name for name, one in tensors.items() if one.dtype == "F8_E4M3"]:
        weight = tensors[name]
        found = [name + suffix for suffix in _NOT_OURS if name + suffix in tensors]
        if not found:
            raise CheckpointError(
                f"A matrix of float8 has a scale; {settings.where} has none of {weight.name}."
            )
        scale = tensors.pop(found[0])
        fits = (1, weight.shape[0])
        if square is not None:
            count = tuple(-(-n // by) for n, by in zip(weight.shape, square, strict=True))
            right = scale.shape == count
        else:
            right = int(np.prod(scale.shape)) in fits
        if not right:
            raise CheckpointError(
                f"{scale.name} of {settings.where} is {list(scale.shape)}, which is no scale for "
                f"each row, square or matrix of {list(weight.shape)}."
            )
        tensors[name] = FloatMatrix(weight, scale, square)  # pyright: ignore[reportArgumentType]
    for name in [name for name in tensors if name.endswith(_BESIDE)]:
        del tensors[name]
    return {}
