"""What a benchmark runs on: the device's name, versions, and whether its memory suffices."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import jax

from ffjax.config import ModelConfig
from ffjax.dims import step_dims

__all__ = ["Machine", "check_memory", "model_bytes"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device and the software that drives it.

    Attributes:
        device: what the device calls itself.
        platform: JAX's name of its kind.
        versions: of jax, jaxlib, ffjax, and of the device's runtime.
    """

    device: str
    platform: str
    versions: dict[str, str]

    @classmethod
    def of(cls, device: Any) -> Machine:
        """The machine of a JAX device."""
        versions = {"jax": jax.__version__}
        for name in ("jaxlib", "ffjax"):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "not installed"
        versions["runtime"] = " ".join(device.client.platform_version.split())
        return cls(device.device_kind, device.platform, versions)


def model_bytes(config: ModelConfig) -> int:
    """Of all weights: those that a step reads, and the embedding where it is not the head."""
    d = step_dims(config, 1, 1)
    row = 2 * d.model_dim  # of the embedding, which is counted for the one sequence
    embed = 0 if config.tied_embeddings else row * d.vocab_size
    return d.step_weight_bytes - row + embed


def check_memory(
    device: Any, config: ModelConfig, slots: int, models: int, caches: int, advice: str
) -> None:
    """Raises a sentence where not even weights and caches fit the device.

    Args:
        device: a JAX device; where it does not say how much memory it has, all is well.
        config: the model's.
        slots: positions of a cache, of all its sequences.
        models: copies of the weights.
        caches: caches that exist at a time.
        advice: what to ask for instead, as "a smaller batch".

    Raises:
        ValueError: they do not fit.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        return
    c = config
    cache = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim * slots
    needed = models * model_bytes(c) + caches * cache
    if needed > limit:
        raise ValueError(
            f"Weights and caches take {needed / 1e9:.1f} GB at the largest point; this device "
            f"has {limit / 1e9:.1f} GB. Ask for {advice}."
        )
