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

from ffjax.decode import default_device

__all__ = [
    "devices",
    "driver_version",
    "no_device",
    "platform_facts",
    "settings",
    "versions",
    "why_no_device",
]

# Distributions that a decode step depends on; those that are not installed are left out.
_DISTRIBUTIONS = (
    *("ffjax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"),
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
    *("nvidia-cuda-nvcc", "safetensors", "tokenizers"),
)
_DRIVER = Path("/proc/driver/nvidia/version")
_NAMES = re.compile(r"(?:JAX|XLA)_\w+|CUDA_VISIBLE_DEVICES|TF_CPP_MIN_LOG_LEVEL")
# Those of them that can leave JAX without a device.
_PLATFORM = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE", "JAX_NUM_CPU_DEVICES")
# How JAX's message begins, and what it advises at the end.
_NOT_STARTED = "Unable to initialize backend"
_ADVICE = re.compile(r"\.? \((?:set JAX_PLATFORMS|you may need to uninstall).*")
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
        RuntimeError, AssertionError: JAX starts none, or not the default one.
    """
    found = []
    for device in _started():
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


def _started() -> list[Any]:
    default_device()
    return jax.devices()


def no_device(error: Exception) -> str:
    """Says that JAX starts no device, and what to do: a sentence or two.

    Args:
        error: what JAX has raised; without a message where the platform it was told to use has no
            devices.
    """
    # JAX's own message, without its lines on how each plugin failed.
    said = _ADVICE.sub("", " ".join(str(error).split()))[:300].rstrip(".")
    said = said or "it finds none of the platform that it is to use"
    asked = {name: os.environ[name] for name in _PLATFORM if os.environ.get(name)}
    if not asked:
        return f"JAX starts no device: {said}. Look at the driver, or set JAX_PLATFORMS=cpu."
    values = " and ".join(f"{name} is {value!r}" for name, value in asked.items())
    instead = ", or set JAX_PLATFORMS=cpu" if [*asked] == ["JAX_PLATFORMS"] else ""
    return (
        f"JAX starts no device: {said}. {values}: unset {'it' if len(asked) == 1 else 'them'}"
        f"{instead}."
    )


def why_no_device(error: Exception) -> str | None:
    """Whether an error comes of JAX starting no device: a sentence or two; None if it does not.

    Args:
        error: what the work ended with. It is looked at because JAX, asked again, is content with
            those of several platforms that it has started.
    """
    if str(error).startswith(_NOT_STARTED):
        return no_device(error)
    try:
        _started()
    except (RuntimeError, AssertionError) as again:
        return no_device(again)
    return None
