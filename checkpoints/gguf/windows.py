"""Which layers are local: what a GGUF file says of it, and what it leaves to its reader."""

from __future__ import annotations

from typing import Any

import numpy as np

from checkpoints.gguf.metadata import Metadata

__all__ = ["read_windows"]

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

# Of families where only some layers are local, every so many-th sees everything. An OLMo 2 with
# windows is OLMo 3.
_PERIODS = {"gemma2": 2, "gemma3": 6, "olmo2": 4}
_GEMMA2_WINDOW = 4096


def read_windows(metadata: Metadata, arch: str, layers: int) -> dict[str, Any]:
    """The fields of config.json for local layers.

    Args:
        metadata: the fields.
        arch: "gemma2", for example.
        layers: L.

    Raises:
        CheckpointError: they ask for what is not supported.
    """
    name = f"{arch}.attention.sliding_window"
    if arch == "llama":
        # Mistral's files are Llama's; most leave the window out, as does what reads them.
        given = metadata.get(name) is not None
        return {"sliding_window": metadata.number(name, "int")} if given else {}
    if arch == "phi3":  # 0 stands for none
        return {"sliding_window": metadata.number(name, "int") if metadata.get(name) else None}
    if arch not in _PERIODS or (arch == "olmo2" and not metadata.get(name)):
        return {}
    pattern = metadata.get(f"{name}_pattern")
    if arch == "gemma3" and not metadata.get(name):
        return {"sliding_window": None, "layer_types": [_GLOBAL] * layers}
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != bool or pattern.size != layers:
            raise metadata.unsupported(
                f"{name}_pattern", pattern, "true or false for each layer", "a period"
            )
        local = pattern.tolist()
    else:
        period = metadata.number(f"{name}_pattern", "int", _PERIODS[arch])
        local = [(i + 1) % period != 0 for i in range(layers)]
    return {
        "sliding_window": metadata.number(name, "int", _GEMMA2_WINDOW),
        "layer_types": [_LOCAL if here else _GLOBAL for here in local],
    }
