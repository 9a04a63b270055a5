"""Folders of adapters (LoRA and others), which hold no model."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints.manifest import CheckpointError

__all__ = ["ADAPTER", "refuse_adapter"]

ADAPTER = "adapter_config.json"


def refuse_adapter(directory: Path, *, whole: bool) -> None:
    """Refuses a folder that has an adapter.

    Args:
        directory: the folder.
        whole: whether it has a model's configuration, too. Then transformers computes the model
            with the adapter, where the package peft is installed, and without it elsewhere.

    Raises:
        CheckpointError: it has one.
    """
    file = directory / ADAPTER
    if not file.is_file():
        return
    try:
        data = json.loads(file.read_bytes())
    except ValueError:
        data = None
    data = data if isinstance(data, dict) else {}
    kind, base = data.get("peft_type"), data.get("base_model_name_or_path")
    what = f"an adapter ({kind})" if isinstance(kind, str) else "an adapter"
    of = base if isinstance(base, str) and base else f"a model that its {ADAPTER} does not name"
    if whole:
        raise CheckpointError(
            f"{directory} has {what} of {of} beside a config.json: a model or an adapter is "
            "expected, and not both. Move the adapter to a folder of its own, and merge it into "
            "the model: `ffjax convert MODEL OUT --adapter DIR`. If the weights there are merged "
            f"already, remove {ADAPTER}."
        )
    raise CheckpointError(
        f"{directory} holds {what} of {of}, and no model. Merge it into that model, "
        f"`ffjax convert MODEL OUT --adapter {directory}`, and give what that makes."
    )
