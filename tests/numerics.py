"""How close is close: the one table of parity tolerances, and the comparisons that use it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "TOLERANCES",
    "Tolerance",
    "assert_close",
    "assert_same_choice",
    "relative_error",
    "worst_error",
]


class Tolerance(NamedTuple):
    """How far apart two arrays of one kind of comparison may lie.

    Attributes:
        relative: limit of `relative_error`.
        worst: limit of `worst_error`, some 5 times the other: noise of n elements has
            a largest one of about sqrt(2 ln n) standard deviations.
        why: where the difference comes from.
    """

    relative: float
    worst: float
    why: str


TOLERANCES: dict[str, Tolerance] = {
    # The reference model against float64, and against itself.
    "model_vs_oracle_float32": Tolerance(
        3e-6, 1e-5, "float32 rounding (2^-24) of sums and sines, over a few layers"
    ),
    "model_vs_oracle_bfloat16": Tolerance(
        2e-2, 8e-2, "activations rounded to bfloat16 (2^-9) at every product, over a few layers"
    ),
    "cached_vs_whole_float32": Tolerance(
        3e-6, 1e-5, "the same float32 sums in another order: other shapes, other blocking"
    ),
    "cached_vs_whole_bfloat16": Tolerance(
        1e-2, 4e-2, "another order of sums moves some activations to the next bfloat16"
    ),
    # The packed prefill against the padded one, the reference: keys and values.
    "packed_vs_padded_float32": Tolerance(
        3e-6, 1e-5, "the same float32 sums in another order; softmax by blocks of keys"
    ),
    "packed_vs_padded_bfloat16": Tolerance(
        2e-2, 1e-1, "the two round attention weights to bfloat16 before and after their sum"
    ),
    "packed_vs_padded_bfloat16_deep": Tolerance(
        3e-2, 1e-1, "the same through 8 layers; both are equally far from float32"
    ),
    "model_vs_hugging_face_float32": Tolerance(
        5e-6, 2e-5, "two float32 implementations, each with its own order of sums"
    ),
    "model_vs_hugging_face_bfloat16": Tolerance(
        2.5e-2, 1e-1, "activations rounded to bfloat16 against float32 ones, the same weights"
    ),
    # Rotary embedding alone.
    "rope_near": Tolerance(1e-6, 5e-6, "float32 rounding of angles of a few radians, and of sines"),
    "rope_far": Tolerance(
        1e-2, 5e-2, "an angle of 131,072 radians is known to 2^-8 in float32, its sine no better"
    ),
    "frequencies_vs_hugging_face": Tolerance(
        1e-6, 1e-6, "they compute powers in float32; single numbers, so both limits are the same"
    ),
    # The fused kernel; weights and cache are bfloat16.
    "fused_vs_model": Tolerance(
        2e-2, 1e-1, "model and kernel round activations to bfloat16 in different places"
    ),
    "fused_vs_model_deep": Tolerance(
        4e-2, 2e-1, "the same, after the 16 to 32 layers of a real model"
    ),
    "fused_vs_float32": Tolerance(
        1e-2, 5e-2, "activations rounded to bfloat16 as operands; the rest is float32"
    ),
    "fused_vs_float32_deep": Tolerance(2e-2, 1e-1, "the same, after 30 layers"),
    "fused_vs_fused": Tolerance(
        1e-2, 5e-2, "another order of sums moves some operands to the next bfloat16"
    ),
    # One phase of the fused kernel, from the same inputs, against float64.
    "accumulated": Tolerance(1e-6, 6e-6, "products of bfloat16 are exact; their sums are float32"),
    "rounded": Tolerance(
        4e-3, 5e-2, "rounded to bfloat16 (2^-9) once, or a value made of such ones"
    ),
}


def _rows(x: Any) -> np.ndarray:
    """As float64 `[rows, n]`, the last axis kept: bfloat16 and float32 convert exactly."""
    x = np.asarray(x)
    # bfloat16 is no dtype of numpy's own, and only some conversions know it.
    x = x.astype(np.float32).astype(np.float64) if x.dtype.itemsize < 4 else x.astype(np.float64)
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)


def _pair(got: Any, want: Any) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(got) != np.shape(want):
        raise AssertionError(f"Shapes differ: got {np.shape(got)}, want {np.shape(want)}.")
    if not np.size(want):
        raise AssertionError(f"Nothing to compare: both are empty, of shape {np.shape(want)}.")
    return _rows(got), _rows(want)


def _largest(distance: np.ndarray, size: np.ndarray) -> float:
    """The largest of distance / size; 0 / 0 is 0, and NaN or infinity anywhere is infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(distance == 0, 0.0, distance / size)
    known = np.isfinite(distance) & np.isfinite(size)
    return float(np.where(known, ratio, np.inf).max())


def relative_error(got: Any, want: Any) -> float:
    """L2 norm of the difference over that of `want`, of the row where that is largest.

    A row is the last axis (the logits of a token, a head's vector), so that one wrong row
    cannot hide among many right ones. Infinity where a row holds NaN or infinity.

    Raises:
        AssertionError: the shapes differ, or are empty.
    """
    got_rows, want_rows = _pair(got, want)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        distance = np.linalg.norm(got_rows - want_rows, axis=-1)
    return _largest(distance, np.linalg.norm(want_rows, axis=-1))


def worst_error(got: Any, want: Any) -> float:
    """The largest difference of two elements, over the root mean square of their row in `want`.

    Raises:
        AssertionError: the shapes differ, or are empty.
    """
    got_rows, want_rows = _pair(got, want)
    with np.errstate(invalid="ignore"):
        distance = np.abs(got_rows - want_rows).max(axis=-1)
    return _largest(distance, np.sqrt(np.mean(want_rows**2, axis=-1)))


def assert_close(got: Any, want: Any, tolerance: str) -> None:
    """Fails unless `got` is as close to `want` as the tolerance of that name asks.

    Args:
        got: an array of any float dtype.
        want: the reference, of the same shape.
        tolerance: a name in TOLERANCES.
    """
    limit = TOLERANCES[tolerance]
    relative, worst = relative_error(got, want), worst_error(got, want)
    if not (relative <= limit.relative and worst <= limit.worst):
        raise AssertionError(
            f"Beyond the tolerance {tolerance!r}: relative error {relative:.3g} (at most "
            f"{limit.relative:.3g}), worst element {worst:.3g} (at most {limit.worst:.3g}). "
            f"What is allowed for: {limit.why}"
        )


def assert_same_choice(got: Any, want: Any, tolerance: str) -> None:
    """Fails unless both rows of logits choose the same token, or nearly tie.

    A near-tie is one that the tolerance's worst difference of single logits explains: the
    choices' logits in `want` lie no further apart than two such differences.

    Args:
        got: logits `[..., V]`.
        want: the reference's logits, of the same shape.
        tolerance: a name in TOLERANCES.
    """
    got_rows, want_rows = _pair(got, want)
    for row, (got_row, want_row) in enumerate(zip(got_rows, want_rows, strict=True)):
        ours, theirs = int(np.argmax(got_row)), int(np.argmax(want_row))
        gap = want_row[theirs] - want_row[ours]
        allowed = 2 * TOLERANCES[tolerance].worst * np.sqrt(np.mean(want_row**2))
        if ours != theirs and not gap <= allowed:
            raise AssertionError(
                f"Row {row} chooses token {ours}, the reference {theirs}: {gap:.3g} above it, "
                f"where {tolerance!r} allows {allowed:.3g}."
            )
