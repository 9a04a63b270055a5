"""Whole-model decode kernels for JAX: one Pallas launch per generated token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffjax.broken import NotFiniteError
from ffjax.cache import KVCache
from ffjax.config import PRESETS, LinearRopeScaling, ModelConfig, RopeScaling, preset
from ffjax.decode import DecodeOutput, decode_step
from ffjax.formats import WeightFormat, WeightFormats
from ffjax.generate import GenerateOutput, generate
from ffjax.model import Transformer
from ffjax.quantize import dequantize, quantize
from ffjax.streaming import Stream, stream
from ffjax.tokenizer import ByteTokenizer, load_tokenizer

if TYPE_CHECKING:
    from checkpoints import SHIPPED_MODEL, HFFolderWarning, convert_hf, export_hf, load, save

__all__ = [
    "PRESETS",
    "SHIPPED_MODEL",
    "ByteTokenizer",
    "DecodeOutput",
    "GenerateOutput",
    "HFFolderWarning",
    "KVCache",
    "LinearRopeScaling",
    "ModelConfig",
    "NotFiniteError",
    "RopeScaling",
    "Stream",
    "Transformer",
    "WeightFormat",
    "WeightFormats",
    "convert_hf",
    "decode_step",
    "dequantize",
    "export_hf",
    "generate",
    "load",
    "load_tokenizer",
    "preset",
    "quantize",
    "save",
    "stream",
]

_FROM_CHECKPOINTS = ("HFFolderWarning", "SHIPPED_MODEL", "convert_hf", "export_hf", "load", "save")


def __getattr__(name: str) -> Any:
    # `checkpoints` imports this package for the model, so its names come when first asked
    # for: either package may then be imported first.
    if name in _FROM_CHECKPOINTS:
        import checkpoints

        return getattr(checkpoints, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
