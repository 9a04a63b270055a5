"""Versions, devices and settings of this process: nothing secret, no folders of the user's."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

__all__ = ["devices", "driver_version", "platform_facts", "settings", "versions"]

# Distributions that a decode step depends on; those that are not installed are left out.
_DISTRIBUTIONS = (
    *("ffjax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"),
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
    *("nvidia-cuda-nvcc", "safetensors", "tokenizers"),
)
_DRIVER = Path("/proc/driver/nvidia/version")
_NAMES = re.compile(r"(?:JAX|XLA)_\w+|CUDA_VISIBLE_DEVICES|TF_CPP_MIN_LOG_LEVEL")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|ADDRESS", re.IGNORECASE)
# A folder may have the user's name in it; a report goes to strangers.
_FOLDER = re.compile(r"(?:~|(?<![\w.])[/\\]|(?<!\w)[A-Za-z]:[/\\])[^\s,;:=]*")


def versions() -> dict[str, str]:
    """Python's version, and that of each distribution that is installed."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None where there is none, or it does not say."""
    try:
        text = _DRIVER.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"Module\D*?\s(\d+\.\d[\d.]*)", text.replace("x86_64", ""))
    return found[1] if found else None


def platform_facts() -> dict[str, Any]:
    """The operating system, its processors and NVIDIA's driver."""
    return {
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "nvidia_driver": driver_version(),
    }


def settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that change what JAX does: folders and secrets are not shown."""
    return {
        name: "(set)" if _SECRET.search(name) else _FOLDER.sub("(a folder)", value)
        for name, value in sorted(environment.items())
        if _NAMES.fullmatch(name)
    }


def devices() -> list[dict[str, Any]]:
    """What JAX can run on.

    Returns:
        Of each device: kind, platform, compute capability and cores (GPUs alone), bytes of memory
        that JAX may use and that are in use (None where the device does not say), and the version
        of its platform.

    Raises:
        RuntimeError: JAX starts none.
    """
    found = []
    for device in jax.devices():
        memory = device.memory_stats() or {}
        found.append(
            {
                "kind": device.device_kind,
                "platform": device.platform,
                "capability": getattr(device, "compute_capability", None),
                "cores": getattr(device, "core_count", None),
                "memory_bytes": memory.get("bytes_limit"),
                "memory_in_use": memory.get("bytes_in_use"),
                "runtime": " ".join(device.client.platform_version.split()),
            }
        )
    return found
