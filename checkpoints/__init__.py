"""Checkpoints of models: saved and restored by Orbax, described by a manifest."""

from checkpoints.manifest import CheckpointError, Manifest
from checkpoints.store import SHIPPED_MODEL, load, save

__all__ = ["SHIPPED_MODEL", "CheckpointError", "Manifest", "load", "save"]
