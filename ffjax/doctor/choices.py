"""Which implementations can run a model here, and why the others cannot."""

from __future__ import annotations

from typing import Any, get_args

from ffjax.config import ModelConfig
from ffjax.decode import Kernel, choose_kernel, why_not_kernel

__all__ = ["BATCHES", "choices"]

BATCHES = (1, 8)


def choices(config: ModelConfig, dtype: Any) -> list[dict[str, Any]]:
    """What a decode step of 1 and of 8 sequences would use on the default device.

    Args:
        config: the model's; the model need not exist.
        dtype: of its weights and cache.

    Returns:
        Of each batch: "batch", "chosen", the implementation's name, and "why_not": of each fused
        kernel a sentence, or None where it can run.
    """
    found = []
    for batch in BATCHES:
        asked = config, dtype, batch, config.max_context
        kernel, _ = choose_kernel(*asked)
        found.append(
            {
                "batch": batch,
                "chosen": kernel or "xla",
                "why_not": {name: why_not_kernel(name, *asked) for name in get_args(Kernel)},
            }
        )
    return found
