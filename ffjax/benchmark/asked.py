"""What every benchmark may be asked for."""

from __future__ import annotations

from ffjax.config import ModelConfig
from ffjax.decode import Implementation, is_fused
from pallas_kernels.support import MAX_BATCH

__all__ = ["MIN_REPETITIONS", "check_asked", "listed"]

# Fewer say little about the spread.
MIN_REPETITIONS = 7


def listed(numbers: tuple[int, ...]) -> str:
    """Numbers in a sentence."""
    return ", ".join(map(str, numbers)) or "none"


def check_asked(
    config: ModelConfig,
    batches: tuple[int, ...],
    steps: int,
    repetitions: int,
    implementation: Implementation | None,
) -> None:
    """Refuses what cannot be measured.

    Args:
        config: the model's.
        batches: values of B.
        steps: steps of a loop.
        repetitions: of each measurement.
        implementation: of the decode steps, or None.

    Raises:
        ValueError: a number is out of its range; the fused kernel is asked for too many
            sequences.
    """
    if not batches or min(batches) < 1:
        raise ValueError(f"A batch has at least 1 sequence, got {listed(batches)}.")
    if steps < 1:
        raise ValueError(f"A loop has at least 1 step, got {steps}.")
    if repetitions < MIN_REPETITIONS:
        raise ValueError(
            f"A median and its spread need at least {MIN_REPETITIONS} repetitions, "
            f"got {repetitions}."
        )
    if is_fused(implementation) and max(batches) > MAX_BATCH:
        raise ValueError(
            f"The fused kernel takes 1 to {MAX_BATCH} sequences; there are "
            f"{max(batches)}. Ask for smaller batches, or time the reference, 'xla'."
        )
