"""Hugging Face folders of quantized matrices, written by the definition of each layout in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hf_folders import config_json, tensors_of
from hf_models import MODELS, HFModel
from safetensors.numpy import save_file

__all__ = [
    "MODEL",
    "PARTS",
    "RECORDED",
    "RECORDED_TOKENS",
    "Folder",
    "in_words",
    "recorded",
    "write_quantized",
]

MODEL = HFModel(
    7,
    {
        **MODELS["tied"].settings,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
)
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def in_words(
    numbers: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))
) -> np.ndarray:
    """Eight integers a word along an axis, nibble k the order's k-th, one after the other."""
    moved = np.moveaxis(numbers.astype(np.int64), axis, -1)
    made = np.zeros((*moved.shape[:-1], moved.shape[-1] // 8), np.int64)
    for word in range(made.shape[-1]):
        for nibble in range(8):
            made[..., word] += moved[..., 8 * word + order[nibble]] << (4 * nibble)
    return np.ascontiguousarray(np.moveaxis(made.astype(np.uint32).view(np.int32), -1, axis))


class Folder:
    """A folder, and what its matrices are: by name, n, z and scales, all `[out, ...]`."""

    def __init__(self, path: Path):
        self.path = path
        self.numbers: dict[str, np.ndarray] = {}
        self.zeros: dict[str, np.ndarray] = {}
        self.scales: dict[str, np.ndarray] = {}

    def fused(self, ours: str, layer: int, what: str) -> np.ndarray:
        """Rows of one of our matrices, in order."""
        names = [f"model.layers.{layer}.{part}" for part in PARTS[ours]]
        return np.concatenate([getattr(self, what)[name] for name in names])


def write_quantized(
    path: Path,
    layout: str,
    *,
    model: HFModel = MODEL,
    group: int | None = 128,
    symmetric: bool = False,
    dtype: Any = np.float16,
    extra: dict[str, np.ndarray] | None = None,
    g_idx: np.ndarray | None = None,
    biases: bool = False,
    least_zero: int = 0,
    **fields: Any,
) -> Folder:
    """Writes a folder of random integers.

    Args:
        path: the folder to make.
        layout: "gptq", "gptq_v2", "awq", "packed", "int8" or "fp8".
        model: its sizes and names.
        group: inputs that share a scale; None, a row.
        symmetric: whether 8 stands for 0 everywhere.
        dtype: of scales.
        extra: more tensors.
        g_idx: of GPTQ, the order of down's inputs.
        biases: whether there are biases of zeros.
        least_zero: zero points are this to 15. GPTQ stores 0 as 15, which not all readers take.
        fields: of quantization_config, besides those that the layout has.
    """
    rng, made = np.random.default_rng(3), Folder(path)
    tensors: dict[str, np.ndarray] = {}
    for name, array in tensors_of(model).items():
        stem = name.removesuffix(".weight")
        if array.ndim != 2 or not stem.startswith("model.layers."):
            tensors[name] = array
            continue
        out, inputs = array.shape
        count = 1 if group is None else inputs // group
        n = rng.integers(0, 16, (out, inputs))
        z = np.full((out, count), 8) if symmetric else rng.integers(least_zero, 16, (out, count))
        scale = (rng.uniform(0.5, 1.5, (out, count)) / 64).astype(dtype)
        made.numbers[stem], made.zeros[stem], made.scales[stem] = n, z, scale
        if layout.startswith("gptq"):
            stored = z if layout == "gptq_v2" else (z - 1) % 16
            tensors[f"{stem}.qweight"] = in_words(n.T, 0)
            tensors[f"{stem}.qzeros"] = in_words(stored.T, 1)
            tensors[f"{stem}.scales"] = np.ascontiguousarray(scale.T)
            order = np.arange(inputs) // (inputs // count)
            if g_idx is not None and stem.endswith("down_proj"):
                order = g_idx
            tensors[f"{stem}.g_idx"] = order.astype(np.int32)
        elif layout == "awq":
            tensors[f"{stem}.qweight"] = in_words(n.T, 1, AWQ_ORDER)
            tensors[f"{stem}.qzeros"] = in_words(z.T, 1, AWQ_ORDER)
            tensors[f"{stem}.scales"] = np.ascontiguousarray(scale.T)
        elif layout == "packed":
            tensors[f"{stem}.weight_packed"] = in_words(n, 1)
            tensors[f"{stem}.weight_scale"] = scale
            tensors[f"{stem}.weight_shape"] = np.array([out, inputs], np.int64)
            if not symmetric:
                tensors[f"{stem}.weight_zero_point"] = in_words(z, 0)
        elif layout == "int8":
            made.numbers[stem] = rng.integers(-128, 128, (out, inputs)).astype(np.int8)
            tensors[f"{stem}.weight"] = made.numbers[stem]
            tensors[f"{stem}.weight_scale"] = scale
        if biases:
            tensors[f"{stem}.bias"] = np.zeros(out, np.float16)
    tensors.update(extra or {})
    weights: dict[str, Any] = {"num_bits": 8 if layout == "int8" else 4, "type": "int"}
    weights |= {"symmetric": symmetric or layout == "int8", "group_size": group}
    weights["strategy"] = "channel" if group is None else "group"
    said = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": group or -1, "sym": symmetric},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"},
        "compressed": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized" if layout == "int8" else "pack-quantized",
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": ["lm_head"],
        },
        "fp8": {"quant_method": "fp8"},
    }
    kind = {"gptq_v2": "gptq", "packed": "compressed", "int8": "compressed"}.get(layout, layout)
    config = said[kind] | ({"checkpoint_format": "gptq_v2"} if layout == "gptq_v2" else {}) | fields
    path.mkdir(parents=True)
    data = config_json(model, quantization_config=config)
    (path / "config.json").write_text(json.dumps(data))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return made


RECORDED_TOKENS = [[1, 30, 7, 12, 39, 0, 5]]
# Folders that `record_hf_quantized.py` has had read by the formats' own libraries.
RECORDED: dict[str, dict[str, Any]] = {
    "packed": {"layout": "packed"},
    "packed, groups of 32": {"layout": "packed", "group": 32},
    "packed, symmetric": {"layout": "packed", "symmetric": True},
    "packed, a scale a row": {"layout": "packed", "symmetric": True, "group": None},
    "int8": {"layout": "int8", "group": None},
    "gptq": {"layout": "gptq", "least_zero": 1, "desc_act": False},
    "gptq, symmetric, groups of 32": {
        "layout": "gptq",
        "group": 32,
        "symmetric": True,
        "desc_act": False,
    },
    "gptq_v2, groups of 64": {"layout": "gptq_v2", "group": 64, "desc_act": False},
    "awq": {"layout": "awq", "zero_point": True},
    "awq, groups of 32": {"layout": "awq", "group": 32, "zero_point": True},
}


def recorded(path: Path, name: str) -> Folder:
    """Writes one of them."""
    return write_quantized(path, **RECORDED[name])
