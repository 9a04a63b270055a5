"""Hugging Face folders for tests: written by the safetensors library, not by ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import MODELS, HFModel
from lora_cases import matrix
from safetensors.numpy import save_file

__all__ = [
    "ARCHITECTURES",
    "FOLDERS",
    "config_json",
    "edit_json",
    "every_model",
    "tensors_of",
    "write_folder",
    "write_lora",
]

# A stretching by length is left out with a warning: test_hf_config.py has a test of its own.
FOLDERS = [name for name in MODELS if name != "dynamic"]
every_model = pytest.mark.parametrize("name", FOLDERS)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}


def config_json(model: HFModel, **changes: Any) -> dict[str, Any]:
    """What transformers 5 writes as config.json, as far as it concerns the model."""
    return {
        "architectures": [ARCHITECTURES[model.family]],
        "model_type": model.family,
        **model.settings,
        **changes,
    }


def tensors_of(model: HFModel, dtype: Any = jnp.bfloat16) -> dict[str, np.ndarray]:
    """The model's tensors; bfloat16 holds them exactly."""
    return {name: np.asarray(array, dtype) for name, array in model.weights().items()}


def write_folder(
    directory: Path,
    model: HFModel | str = "tied",
    *,
    tensors: dict[str, np.ndarray] | None = None,
    dtype: Any = jnp.bfloat16,
    shards: int = 1,
    **changes: Any,
) -> Path:
    """A folder with config.json and safetensors: in one file, or in shards with an index."""
    model = MODELS[model] if isinstance(model, str) else model
    tensors = tensors_of(model, dtype) if tensors is None else tensors
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_json(model, **changes)))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    names, weight_map = list(tensors), {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        mine = names[k::shards]
        save_file({name: tensors[name] for name in mine}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_lora(directory: Path, matrices: dict[str, np.ndarray], **fields: Any) -> Path:
    """An adapter: lora_A and lora_B of a rank of 2 for matrices by modules' names."""
    directory.mkdir(parents=True)
    tensors = {}
    for name, array in matrices.items():
        rows, columns = array.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = matrix(0, (2, columns))
        tensors[f"base_model.model.{name}.lora_B.weight"] = matrix(1, (rows, 2))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": [*matrices]}
    (directory / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return directory


def edit_json(file: Path, **changes: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
