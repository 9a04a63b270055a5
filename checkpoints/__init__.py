"""Checkpoints of models: saved and restored by Orbax, described by a manifest.

Hugging Face checkpoints come in by `load` and `convert_hf` and go out by `export_hf`. GGUF files
come in by `load` and `convert_gguf`.
"""

from checkpoints.gguf import convert_gguf
from checkpoints.hf_export import export_hf
from checkpoints.hf_fields import HFFolderWarning
from checkpoints.hf_import import convert_hf
from checkpoints.manifest import CheckpointError, Manifest
from checkpoints.store import SHIPPED_MODEL, load, save, tokenizer_at, tokenizer_directory

__all__ = [
    "SHIPPED_MODEL",
    "CheckpointError",
    "HFFolderWarning",
    "Manifest",
    "convert_gguf",
    "convert_hf",
    "export_hf",
    "load",
    "save",
    "tokenizer_at",
    "tokenizer_directory",
]
