"""Whole-model decode kernels for JAX: one Pallas launch per generated token."""

from checkpoints import SHIPPED_MODEL, load, save
from ffjax.cache import KVCache
from ffjax.config import PRESETS, ModelConfig, RopeScaling, preset
from ffjax.decode import DecodeOutput, decode_step
from ffjax.generate import GenerateOutput, generate
from ffjax.model import Transformer
from ffjax.streaming import Stream, stream
from ffjax.tokenizer import ByteTokenizer

__all__ = [
    "PRESETS",
    "SHIPPED_MODEL",
    "ByteTokenizer",
    "DecodeOutput",
    "GenerateOutput",
    "KVCache",
    "ModelConfig",
    "RopeScaling",
    "Stream",
    "Transformer",
    "decode_step",
    "generate",
    "load",
    "preset",
    "save",
    "stream",
]
