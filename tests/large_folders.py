"""Models of the widths of Llama 3.1 70B, or of others, as they come in: of few layers, or of zeros.

What a conversion holds in memory depends on sizes alone. Files of zeros take no room on a disk that
knows holes, so that all 80 layers can be read where there is no room for them. With the widths of
Llama 3.1 70B, `python -m tests.large_folders LAYOUT LAYERS PATH` writes one; LAYOUT may be "lora".
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["LAYOUTS", "LLAMA_70B", "Sizes", "write_adapter", "write_model"]

LAYOUTS = ("bf16", "q4_0", "q4_k", "gptq", "packed", "fp8")
"""bfloat16 safetensors; GGUF of Q4_0 or of Q4_K; GPTQ; compressed-tensors, "pack-quantized"; FP8 in
squares."""

_GROUP = 128
_SHARD_BYTES = 5 * 10**9
# Random bytes that are written over and over.
_BYTES = 16 << 20
_BYTES_EACH = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "F8_E4M3": 1}
_BLOCKS = {"Q4_0": (32, 18), "Q4_K": (256, 144)}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Those of a Llama whose heads have 128 elements."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    head: int = 128

    def matrices(self, layers: int) -> dict[str, tuple[int, int]]:
        """The matrices of the layers, by Hugging Face's names without ".weight"."""
        queries, kvs = self.heads * self.head, self.kv_heads * self.head
        one = {
            "self_attn.q_proj": (queries, self.width),
            "self_attn.k_proj": (kvs, self.width),
            "self_attn.v_proj": (kvs, self.width),
            "self_attn.o_proj": (self.width, queries),
            "mlp.gate_proj": (self.inner, self.width),
            "mlp.up_proj": (self.inner, self.width),
            "mlp.down_proj": (self.width, self.inner),
        }
        return {
            f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()
        }

    def others(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Embedding, head and norms, by Hugging Face's names without ".weight"."""
        norms = ("input_layernorm", "post_attention_layernorm")
        return {
            "model.embed_tokens": (self.vocab, self.width),
            **{f"model.layers.{i}.{name}": (self.width,) for i in range(layers) for name in norms},
            "model.norm": (self.width,),
            "lm_head": (self.vocab, self.width),
        }


LLAMA_70B = Sizes(width=8192, inner=28672, heads=64, kv_heads=8, vocab=128256)


def write_model(path: Path, layout: str, sizes: Sizes, layers: int, *, random: bool = False) -> int:
    """Writes a model.

    Args:
        path: the folder to make, or the file of a GGUF layout.
        layout: one of `LAYOUTS`.
        sizes: its widths.
        layers: how many it has.
        random: whether its matrices are random; else zeros, which a disk need not hold.

    Returns:
        The bytes of its tensors.
    """
    if layout in ("q4_0", "q4_k"):
        return _write_gguf(path, layout.upper(), sizes, layers, random)
    path.mkdir(parents=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head,
        "num_hidden_layers": layers,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if layout != "bf16":
        config["quantization_config"] = _QUANTIZATION[layout]
    (path / "config.json").write_text(json.dumps(config))
    tensors: dict[str, _Tensor] = {
        f"{name}.weight": _Tensor("BF16", shape, _normal if random else None)
        for name, shape in sizes.others(layers).items()
    }
    for name, shape in sizes.matrices(layers).items():
        tensors |= _matrix(name, shape, layout, random)
    return _write_shards(path, tensors)


def write_adapter(path: Path, sizes: Sizes, layers: int, rank: int = 16) -> int:
    """Writes an adapter of zeros for every matrix of the layers; returns its tensors' bytes."""
    path.mkdir(parents=True)
    tensors = {}
    for name, (out, inputs) in sizes.matrices(layers).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _Tensor("BF16", (rank, inputs))
        tensors[f"base_model.model.{name}.lora_B.weight"] = _Tensor("BF16", (out, rank))
    modules = sorted({name.rpartition(".")[2] for name in sizes.matrices(1)})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return _write_safetensors(path / "adapter_model.safetensors", tensors)


_QUANTIZATION: dict[str, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": _GROUP,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
    },
    "packed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "group_size": _GROUP,
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "ignore": ["lm_head"],
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": [_GROUP, _GROUP]},
}


@functools.cache
def _normal() -> bytes:
    drawn = np.random.default_rng(0).normal(0, 0.02, _BYTES // 2)
    return drawn.astype(ml_dtypes.bfloat16).tobytes()


@functools.cache
def _drawn() -> bytes:
    return np.random.default_rng(1).bytes(_BYTES)


def _eights() -> bytes:
    """Words of the integer 8, which stands for 0."""
    return b"\x88" * _BYTES


@dataclasses.dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    numbers: Any = None  # makes bytes that are repeated; None: zeros

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES_EACH[self.dtype]


def _matrix(name: str, shape: tuple[int, int], layout: str, random: bool) -> dict[str, _Tensor]:
    out, inputs = shape
    groups = inputs // _GROUP
    words, scales = (_drawn, _normal) if random else (None, None)
    if layout == "gptq":
        return {
            f"{name}.qweight": _Tensor("I32", (inputs // 8, out), words),
            f"{name}.qzeros": _Tensor("I32", (groups, out // 8), _eights),
            f"{name}.scales": _Tensor("F16", (groups, out), _eights if random else None),
        }
    if layout == "packed":
        return {
            f"{name}.weight_packed": _Tensor("I32", (out, inputs // 8), words),
            f"{name}.weight_scale": _Tensor("BF16", (out, groups), scales),
            f"{name}.weight_shape": _Tensor("I64", (2,)),
        }
    if layout == "fp8":
        return {
            f"{name}.weight": _Tensor("F8_E4M3", shape),
            f"{name}.weight_scale_inv": _Tensor("F32", (out // _GROUP, groups)),
        }
    return {f"{name}.weight": _Tensor("BF16", shape, scales)}


def _write_shards(path: Path, tensors: dict[str, _Tensor]) -> int:
    """In files of 5 GB, with an index, as transformers writes them."""
    shards: list[dict[str, _Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return _write_safetensors(path / "model.safetensors", shards[0])
    where, total = {}, 0
    for k, shard in enumerate(shards, 1):
        file = f"model-{k:05}-of-{len(shards):05}.safetensors"
        total += _write_safetensors(path / file, shard)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_safetensors(file: Path, tensors: dict[str, _Tensor]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        _write_numbers(opened, [(tensor.nbytes, tensor.numbers) for tensor in tensors.values()])
    return end


def _write_numbers(file: Any, wanted: list[tuple[int, Any]]) -> None:
    """Bytes one after the other; zeros are skipped, which leaves holes."""
    end = file.tell()
    for nbytes, numbers in wanted:
        if numbers is not None:
            block = numbers()
            file.seek(end)
            for start in range(0, nbytes, len(block)):
                file.write(block[: nbytes - start])
        end += nbytes
    file.truncate(end)


def _write_gguf(file: Path, kind: str, sizes: Sizes, layers: int, random: bool) -> int:
    """A file whose matrices are all of one type, embedding and head too, and norms float32."""
    import gguf
    from gguf_vocabularies import byte_vocabulary

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(sizes.vocab)
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(sizes.width)
    writer.add_feed_forward_length(sizes.inner)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head)
    writer.add_value_length(sizes.head)
    writer.add_rope_dimension_count(sizes.head)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for field, value in byte_vocabulary().items():
        name = field.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    inputs, nbytes = _BLOCKS[kind]
    wanted = []
    for name, shape in (sizes.others(layers) | sizes.matrices(layers)).items():
        called = named.get_name(f"{name}.weight", try_suffixes=(".weight",))
        assert called is not None, name
        if len(shape) == 1:
            size = 4 * shape[0]
            writer.add_tensor_info(called, shape, np.dtype(np.float32), size)
            wanted.append((size, None))
            continue
        # Of quantized tensors the writer is told the bytes of a row.
        row = shape[1] // inputs * nbytes
        size = shape[0] * row
        quantized = gguf.GGMLQuantizationType[kind]
        stored = (shape[0], row)
        writer.add_tensor_info(called, stored, np.dtype(np.uint8), size, raw_dtype=quantized)
        wanted.append((size, _small if random else None))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (opened,) = writer.fout
    align = writer.data_alignment
    opened.seek(-(-opened.tell() // align) * align)
    assert all(size % align == 0 for size, _ in wanted)
    _write_numbers(opened, wanted)
    writer.close()
    return sum(size for size, _ in wanted)


def _small() -> bytes:
    """Random bits would be infinite scales: two such bytes are 0.016 in float16."""
    return b"\x24" * _BYTES


def main(layout: str, layers: str, path: str) -> None:
    """Writes a model or an adapter of zeros, and prints the bytes of its tensors."""
    sys.path.append(str(Path(__file__).parent))  # tests import each other by their files' names
    if layout == "lora":
        nbytes = write_adapter(Path(path), LLAMA_70B, int(layers))
    else:
        nbytes = write_model(Path(path), layout, LLAMA_70B, int(layers))
    print(f"{path}: {nbytes:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
