"""GGUF files for tests: written by the package gguf, in the layout of llama.cpp's converter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from hf_models import MODELS, HFModel

__all__ = ["ARCHITECTURES", "blocks", "interleaved", "rope_factors", "whole", "write_gguf"]

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "olmo3": "olmo2"}
_INTERLEAVED = ("llama", "mistral", "granite", "smollm3")


def write_gguf(
    file: Path,
    model: HFModel | str = "tied",
    *,
    dtype: str = "BF16",
    raw: Mapping[str, tuple[np.ndarray, str]] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], None] | None = None,
    big: bool = False,
    **fields: Any,
) -> Path:
    """Writes a model.

    Args:
        file: the file to make.
        model: the model, or its name.
        dtype: of matrices, "BF16", "F16", "F32" or what the package quantizes to.
        raw: by GGUF's name, the bytes of a tensor's rows in its own order, and their type.
        tensors: changes the tensors by GGUF's names before they are written.
        big: whether numbers are big-endian.
        fields: metadata to add or, with None, to leave out; "__" stands for ".".
    """
    model = MODELS[model] if isinstance(model, str) else model
    arch = ARCHITECTURES.get(model.family, model.family)
    endian = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(file, arch, endianess=endian)
    _add_settings(writer, model)
    for name, value in fields.items():
        _set(writer, name.replace("__", "."), value)
    kinds = getattr(gguf.MODEL_ARCH, arch.upper())
    named = gguf.get_tensor_name_map(kinds, model.settings["num_hidden_layers"])
    theirs: dict[str, np.ndarray] = {}
    for name, array in model.weights().items():
        called = named.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called is not None, name
        theirs[called] = _as_theirs(model, name, array)
    if (factors := rope_factors(model)) is not None:
        theirs["rope_freqs.weight"] = factors
    for kind in ("short", "long"):
        if (found := model.settings["rope_parameters"].get(f"{kind}_factor")) is not None:
            theirs[f"rope_factors_{kind}.weight"] = np.array(found, np.float32)
    if tensors is not None:
        tensors(theirs)
    raw = raw or {}
    for name, array in theirs.items():
        if name in raw:
            stored, kind = raw[name]
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
        elif array.ndim == 1 or dtype == "F32":
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        elif dtype == "BF16":
            stored = np.ascontiguousarray(array).astype(jnp.bfloat16).view(np.uint8)
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            kind = gguf.GGMLQuantizationType[dtype]
            writer.add_tensor(
                name, gguf.quantize(np.asarray(array, np.float32), kind), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_settings(writer: gguf.GGUFWriter, model: HFModel) -> None:
    s = model.settings
    ropes = s["rope_parameters"]
    everywhere = ropes.get("full_attention", ropes)
    size = s.get("head_dim", s["hidden_size"] // s["num_attention_heads"])
    writer.add_vocab_size(s["vocab_size"])
    writer.add_block_count(s["num_hidden_layers"])
    writer.add_context_length(s.get("max_position_embeddings", 2048))
    writer.add_embedding_length(s["hidden_size"])
    writer.add_feed_forward_length(s["intermediate_size"])
    writer.add_head_count(s["num_attention_heads"])
    writer.add_head_count_kv(s["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(int(size * everywhere.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(everywhere["rope_theta"])
    writer.add_layer_norm_rms_eps(s["rms_norm_eps"])
    if everywhere["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(everywhere["factor"])
    original = s.get("original_max_position_embeddings")
    if everywhere["rope_type"] == "yarn":
        original = everywhere["original_max_position_embeddings"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(everywhere["factor"])
        if (fast := everywhere.get("beta_fast")) is not None:
            writer.add_rope_scaling_yarn_beta_fast(fast)
        if (attention := everywhere.get("attention_factor")) is not None:
            writer.add_float32(f"{writer.arch}.rope.scaling.yarn_attn_factor", attention)
    if everywhere["rope_type"] == "longrope":
        assert original is not None
        scale = s["max_position_embeddings"] / original
        growth = math.sqrt(1 + math.log(scale) / math.log(original))
        writer.add_rope_scaling_attn_factors(growth)
    if original is not None:
        writer.add_rope_scaling_orig_ctx_len(original)
    if "sliding_window" in s:
        writer.add_sliding_window(s["sliding_window"] or 0)
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if "layer_types" in s:
        writer.add_sliding_window_pattern([kind[0] == "s" for kind in s["layer_types"]])
    elif model.family == "olmo3":
        writer.add_sliding_window_pattern([(i + 1) % 4 != 0 for i in range(s["num_hidden_layers"])])
    if "attn_logit_softcapping" in s:
        writer.add_attn_logit_softcapping(s["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(s["final_logit_softcapping"])
    if "query_pre_attn_scalar" in s:
        writer.add_attention_scale(s["query_pre_attn_scalar"] ** -0.5)
    if "attention_multiplier" in s:
        writer.add_attention_scale(s["attention_multiplier"])
        writer.add_embedding_scale(s["embedding_multiplier"])
        writer.add_residual_scale(s["residual_multiplier"])
        writer.add_logit_scale(s["logits_scaling"])


def _set(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Puts a field into the metadata, or out of it."""
    data = writer.kv_data[0]
    data.pop(name, None)
    if isinstance(value, list):
        writer.add_array(name, value)
    elif value is not None:
        kinds = {bool: "bool", int: "int32", float: "float32", str: "string"}
        getattr(writer, f"add_{kinds[type(value)]}")(name, value)


def _as_theirs(model: HFModel, name: str, array: np.ndarray) -> np.ndarray:
    """A tensor of Hugging Face's as GGUF has it."""
    s = model.settings
    if model.is_gemma and name.endswith("norm.weight"):
        return array + 1
    heads = {"q_proj": s["num_attention_heads"], "k_proj": s["num_key_value_heads"]}
    count = heads.get(name.split(".")[-2])
    return interleaved(array, count) if count and model.family in _INTERLEAVED else array


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads with what RoPE turns together side by side: 0, H/2, 1, H/2 + 1 and so on."""
    half = array.shape[0] // heads // 2
    order = [
        head * 2 * half + k + part * half
        for head in range(heads)
        for k in range(half)
        for part in (0, 1)
    ]
    return array[order]


def rope_factors(model: HFModel) -> np.ndarray | None:
    """What each frequency of Llama 3.1 is divided by, float32 `[H/2]`; None: by nothing."""
    rope = model.settings["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return None
    size = model.settings["head_dim"]
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for k in range(0, size, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (k / size)
        if wave < high:
            factors.append(1.0)
        elif wave > low:
            factors.append(rope["factor"])
        else:
            smooth = (low / wave - 1) / (low / high - 1)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


# The formats of blocks, as they are defined: drawn here, and made whole again number by number.

_BYTES = {
    "Q4_0": 18,
    "Q4_1": 20,
    "Q5_0": 22,
    "Q5_1": 24,
    "Q8_0": 34,
    "Q2_K": 84,
    "Q3_K": 110,
    "Q4_K": 144,
    "Q5_K": 176,
    "Q6_K": 210,
}
# Where a block has its float16 numbers, in bytes.
_SCALES = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}


def blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random blocks, uint8 `[rows, bytes of a row]`, with sane scales."""
    random = np.random.default_rng(seed)
    numbers = 256 if kind.endswith("_K") else 32
    count = columns // numbers
    made = random.integers(0, 256, (rows, count, _BYTES[kind]), np.uint8)
    for at in _SCALES.get(kind, (0,)):
        scale = random.uniform(-0.01, 0.01, (rows, count)).astype(np.float16)
        made[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    return made.reshape(rows, -1)


def whole(kind: str, stored: np.ndarray) -> np.ndarray:
    """The numbers of blocks, float64 `[rows, columns]`."""
    split = stored.reshape(-1, _BYTES[kind])
    made = [_FORMULAS[kind](block.tobytes()) for block in split]
    return np.array(made, np.float64).reshape(stored.shape[0], -1)


def _half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], "<f2")[0])


def _nibbles(quants: bytes) -> list[int]:
    return [byte & 15 for byte in quants] + [byte >> 4 for byte in quants]


def _q4_0(block: bytes) -> list[float]:
    return [_half(block, 0) * (q - 8) for q in _nibbles(block[2:])]


def _q4_1(block: bytes) -> list[float]:
    return [_half(block, 0) * q + _half(block, 2) for q in _nibbles(block[4:])]


def _fifth(block: bytes, at: int) -> list[int]:
    high = int.from_bytes(block[at : at + 4], "little")
    return [q + 16 * (high >> i & 1) for i, q in enumerate(_nibbles(block[at + 4 :]))]


def _q5_0(block: bytes) -> list[float]:
    return [_half(block, 0) * (q - 16) for q in _fifth(block, 2)]


def _q5_1(block: bytes) -> list[float]:
    return [_half(block, 0) * q + _half(block, 2) for q in _fifth(block, 4)]


def _q8_0(block: bytes) -> list[float]:
    return [_half(block, 0) * (q - 256 if q > 127 else q) for q in block[2:]]


def _six_bits(packed: bytes) -> list[tuple[int, int]]:
    """Scale and least number of the eight groups of a block, from 12 bytes."""
    pairs = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    for j in range(4):
        scale = (packed[j + 8] & 15) | (packed[j] >> 6 << 4)
        least = (packed[j + 8] >> 4) | (packed[j + 4] >> 6 << 4)
        pairs.append((scale, least))
    return pairs


def _groups(block: bytes, quants: list[int]) -> list[float]:
    scales = _six_bits(block[4:16])
    d, dmin = _half(block, 0), _half(block, 2)
    return [d * scales[i // 32][0] * q - dmin * scales[i // 32][1] for i, q in enumerate(quants)]


def _low_bits(quants: bytes) -> list[int]:
    return [q for c in range(0, 128, 32) for q in _nibbles(quants[c : c + 32])]


def _q4_k(block: bytes) -> list[float]:
    return _groups(block, _low_bits(block[16:]))


def _q5_k(block: bytes) -> list[float]:
    high = block[16:48]
    low = _low_bits(block[48:])
    return _groups(block, [q + 16 * (high[i % 32] >> i // 32 & 1) for i, q in enumerate(low)])


def _two_bits(quants: bytes) -> list[int]:
    """Of 64 bytes the lowest two bits of 32, then the next two of the same, then the other 32."""
    return [quants[32 * (i // 128) + i % 32] >> 2 * (i // 32 % 4) & 3 for i in range(256)]


def _q2_k(block: bytes) -> list[float]:
    d, dmin = _half(block, 80), _half(block, 82)
    quants = enumerate(_two_bits(block[16:80]))
    return [d * (block[i // 16] & 15) * q - dmin * (block[i // 16] >> 4) for i, q in quants]


def _q3_k(block: bytes) -> list[float]:
    high, packed = block[:32], block[96:108]
    scales = []
    for j in range(16):
        four = packed[j] & 15 if j < 8 else packed[j - 8] >> 4
        two = packed[8 + j % 4] >> 2 * (j // 4) & 3
        scales.append((four | two << 4) - 32)
    quants = enumerate(_two_bits(block[32:96]))
    d = _half(block, 108)
    return [d * scales[i // 16] * (q - 4 * (1 - (high[i % 32] >> i // 32 & 1))) for i, q in quants]


def _q6_k(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    made = []
    for i in range(256):
        part, inner = divmod(i, 128)
        quarter, at = divmod(inner, 32)
        byte = low[64 * part + 32 * (quarter % 2) + at]
        four = byte >> 4 if quarter > 1 else byte & 15
        two = high[32 * part + at] >> 2 * quarter & 3
        made.append(_half(block, 208) * int(scales[i // 16]) * ((four | two << 4) - 32))
    return made


_FORMULAS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
