"""The steps that are looked at: small shapes, every kind of code that a step can be made of."""

from __future__ import annotations

import dataclasses

from decode_cases import small_config
from quantize_cases import FOR_KERNELS, GROUPED, kernel_config
from stream_cases import FAMILIES

from ffjax.config import ModelConfig

__all__ = ["CASES", "Case"]


@dataclasses.dataclass(frozen=True)
class Case:
    """Some decode steps.

    Attributes:
        config: the model's, with random weights.
        lengths: live positions of each sequence before the first step.
        capacity: S.
        tokens: T, that a step takes of each sequence.
        gpu: a target of `pallas_kernels.targets` that the device is taken for: its copies and its
            shared memory. None: the device as it is.
    """

    config: ModelConfig
    lengths: tuple[int, ...]
    capacity: int = 150
    tokens: int = 1
    gpu: str | None = None


# Around the edges of a tile of keys; one sequence that is empty.
_ONE, _THREE = (65,), (65, 0, 129)
# After the first two KV splits, which are 256 positions at least: they are combined.
_LONG, _LONG_THREE = (700,), (700, 257, 3)
_HEADS = {"num_heads": 4, "num_kv_heads": 2}
# Down projections wider than what the threads of a program hold: two programs share a row.
_SPLIT = {"num_layers": 1, "ffw_dim": 8_448}


def _each(name: str, config: ModelConfig) -> dict[str, Case]:
    return {f"{name}, 1": Case(config, _ONE), f"{name}, 3": Case(config, _THREE)}


def _split_int8(ffw_dim: int) -> ModelConfig:
    return kernel_config(FOR_KERNELS["int8 and its head"], **_SPLIT | {"ffw_dim": ffw_dim})


CASES: dict[str, Case] = {
    **_each("bfloat16", small_config()),
    **_each("int8", kernel_config(FOR_KERNELS["int8 and its head"])),
    **_each("int4", kernel_config(FOR_KERNELS["int4 and its head"])),
    **_each("mixed", kernel_config(FOR_KERNELS["mixed"])),
    **_each("groups", kernel_config(GROUPED["of files"])),
    **_each("groups, otherwise", kernel_config(GROUPED["of files, otherwise"])),
    "gemma2, 3": Case(small_config(**FAMILIES["gemma2"]), _THREE),
    "olmo2, 1": Case(small_config(**FAMILIES["olmo2"]), _ONE),
    "qwen3, 3": Case(small_config(**FAMILIES["qwen3"]), _THREE),
    "several KV splits, 1": Case(small_config(**_HEADS), _LONG, 1024),
    "several KV splits, 3": Case(small_config(**_HEADS), _LONG_THREE, 1024),
    "split down projection, 1": Case(small_config(**_SPLIT), _ONE),
    "split down projection, 3": Case(small_config(**_SPLIT), _THREE),
    "split down projection, int8, 3": Case(_split_int8(8_448), _THREE),
    # Of whole parts alone: tiles come as boxes, which a tensor map describes.
    "split down projection, boxes, 3": Case(_split_int8(8_704), _THREE),
    # Queries for more warps than one; few parts, which have programs for some of them, and many.
    "8 tokens, bfloat16, 1": Case(small_config(**_HEADS), (65,), tokens=8),
    "8 tokens, several KV splits, 1": Case(small_config(**_HEADS), _LONG, 1024, tokens=8),
    "3 tokens, int4, 2": Case(kernel_config(FOR_KERNELS["int4 and its head"]), (65, 0), tokens=3),
    "4 tokens, gemma2, 2": Case(small_config(**FAMILIES["gemma2"]), (65, 2), tokens=4),
    "8 tokens, qwen3, 1": Case(small_config(**FAMILIES["qwen3"]), (65,), tokens=8),
    # Copies of 16 bytes a thread, and little shared memory.
    "as an A100, bfloat16, 1": Case(small_config(), _ONE, gpu="a100"),
    "as an A100, int8, 3": Case(
        kernel_config(FOR_KERNELS["int8 and its head"]), _THREE, gpu="a100"
    ),
    "as an A100, int4, 3": Case(
        kernel_config(FOR_KERNELS["int4 and its head"]), _THREE, gpu="a100"
    ),
    "as an A100, several KV splits, 3": Case(small_config(**_HEADS), _LONG_THREE, 1024, gpu="a100"),
    "as an A100, 4 tokens, bfloat16, 2": Case(
        small_config(**_HEADS), (65, 3), tokens=4, gpu="a100"
    ),
}
"""By name; the last number is that of the sequences."""
