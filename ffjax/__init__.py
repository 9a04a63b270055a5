"""Whole-model decode kernels for JAX: one Pallas launch per generated token."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoints import (
        SHIPPED_MODEL,
        HFFolderWarning,
        convert_gguf,
        convert_hf,
        export_hf,
        load,
        save,
    )
    from ffjax.broken import NotFiniteError
    from ffjax.cache import KVCache
    from ffjax.calibration import Calibration
    from ffjax.calibration_text import calibration_tokens
    from ffjax.config import (
        PRESETS,
        LinearRopeScaling,
        LongRopeScaling,
        ModelConfig,
        RopeScaling,
        YarnRopeScaling,
        preset,
    )
    from ffjax.decode import DecodeOutput, decode_step
    from ffjax.formats import WeightFormat, WeightFormats
    from ffjax.generation import GenerateOutput, generate
    from ffjax.heads import widen_heads
    from ffjax.model import Transformer
    from ffjax.quantization import dequantize, quantize
    from ffjax.sampling.logprobs import TokenLogprobs
    from ffjax.sampling.params import SamplingParams
    from ffjax.speculation.draft import Draft
    from ffjax.speculation.lookup import Lookup
    from ffjax.streaming import Stream, stream
    from ffjax.text.completion import Completion
    from ffjax.text.generator import Generator
    from ffjax.text.session import ChatSession
    from ffjax.text.stream import TextStream
    from ffjax.text.tokenizers import load_tokenizer
    from ffjax.tokenizer import ByteTokenizer

__all__ = [
    "PRESETS",
    "SHIPPED_MODEL",
    "ByteTokenizer",
    "Calibration",
    "ChatSession",
    "Completion",
    "DecodeOutput",
    "Draft",
    "GenerateOutput",
    "Generator",
    "HFFolderWarning",
    "KVCache",
    "LinearRopeScaling",
    "LongRopeScaling",
    "Lookup",
    "ModelConfig",
    "NotFiniteError",
    "RopeScaling",
    "SamplingParams",
    "Stream",
    "TextStream",
    "TokenLogprobs",
    "Transformer",
    "WeightFormat",
    "WeightFormats",
    "YarnRopeScaling",
    "calibration_tokens",
    "convert_gguf",
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
    "widen_heads",
]

# Names are imported when they are first asked for. So `checkpoints`, which imports the modules that
# a model is made of, need not import what loads models; and a setting that JAX refuses when it is
# imported reaches the command line, which says so in a sentence.
_HOME = {
    "checkpoints": (
        *("HFFolderWarning", "SHIPPED_MODEL"),
        *("convert_gguf", "convert_hf", "export_hf", "load", "save"),
    ),
    "ffjax.broken": ("NotFiniteError",),
    "ffjax.cache": ("KVCache",),
    "ffjax.calibration": ("Calibration",),
    "ffjax.calibration_text": ("calibration_tokens",),
    "ffjax.config": (
        *("PRESETS", "LinearRopeScaling", "LongRopeScaling", "ModelConfig", "RopeScaling"),
        *("YarnRopeScaling", "preset"),
    ),
    "ffjax.decode": ("DecodeOutput", "decode_step"),
    "ffjax.formats": ("WeightFormat", "WeightFormats"),
    "ffjax.generation": ("GenerateOutput", "generate"),
    "ffjax.heads": ("widen_heads",),
    "ffjax.model": ("Transformer",),
    "ffjax.quantization": ("dequantize", "quantize"),
    "ffjax.sampling.logprobs": ("TokenLogprobs",),
    "ffjax.sampling.params": ("SamplingParams",),
    "ffjax.speculation.draft": ("Draft",),
    "ffjax.speculation.lookup": ("Lookup",),
    "ffjax.streaming": ("Stream", "stream"),
    "ffjax.text.completion": ("Completion",),
    "ffjax.text.generator": ("Generator",),
    "ffjax.text.session": ("ChatSession",),
    "ffjax.text.stream": ("TextStream",),
    "ffjax.text.tokenizers": ("load_tokenizer",),
    "ffjax.tokenizer": ("ByteTokenizer",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
