"""Records what transformers makes of quantized folders, for `test_hf_quantized.py`.

Run it where torch and the formats' own libraries are installed; the tests need none of them:

    pip install torch transformers compressed-tensors gptqmodel optimum jax pytest safetensors
    python tests/record_hf_quantized.py

gptqmodel reads GPTQ and AWQ, compressed-tensors its own. `goldens/quantized.npz` holds for each
folder that `hf_quantized_cases.recorded` writes a digest of each matrix as the library makes it
whole, in float16, and the float32 logits of transformers with these matrices.
"""

# The environments that check types and run the tests have no torch.
# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hf_quantized_cases import RECORDED, RECORDED_TOKENS, recorded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "quantized.npz"


def by_modules(path: pathlib.Path, stems: list[str], how: Any) -> dict[str, torch.Tensor]:
    """Matrices `[out, in]` by which gptqmodel's layers multiply, read through transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float16, device_map="cpu", quantization_config=how
    )

    def made(layer: Any) -> torch.Tensor:
        with torch.no_grad():
            return layer(torch.eye(layer.in_features, dtype=torch.float16)).T.contiguous()

    return {stem: made(model.get_submodule(stem)) for stem in stems}


def by_compressors(path: pathlib.Path, stems: list[str]) -> dict[str, torch.Tensor]:
    """Matrices `[out, in]` as compressed-tensors makes them whole, by what config.json says."""
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(said["format"])
    tensors = load_file(path / "model.safetensors")

    def made(stem: str) -> torch.Tensor:
        own = {n.rpartition(".")[2]: x for n, x in tensors.items() if n.startswith(f"{stem}.")}
        return compressor.decompress(own, scheme)["weight"].contiguous()

    return {stem: made(stem) for stem in stems}


def read(path: pathlib.Path, layout: str, stems: list[str]) -> dict[str, torch.Tensor]:
    """A folder's matrices by the library of its layout, in float16."""
    if layout.startswith("gptq"):
        return by_modules(path, stems, GPTQConfig(bits=4, backend="torch"))
    if layout == "awq":
        return by_modules(path, stems, AwqConfig(bits=4, backend="torch_awq"))
    return by_compressors(path, stems)


def plain(path: pathlib.Path, matrices: dict[str, torch.Tensor]) -> Any:
    """The same model with plain matrices, in float32."""
    config = transformers.AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_file(path / "model.safetensors")
    state = {name: array for name, array in tensors.items() if name in model.state_dict()}
    state |= {f"{name}.weight": matrix for name, matrix in matrices.items()}
    missing = model.load_state_dict({n: x.float() for n, x in state.items()}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.eval()


def main() -> None:
    """Writes the file."""
    made: dict[str, Any] = {}
    for name in RECORDED:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "m"
            stems = sorted(recorded(path, name).numbers)
            matrices = read(path, RECORDED[name]["layout"], stems)
            for stem, matrix in matrices.items():
                assert matrix.dtype == torch.float16, (name, stem, matrix.dtype)
                digest = hashlib.sha256(matrix.numpy().tobytes()).hexdigest()
                made[f"{name}/{stem}"] = np.array(digest)
            with torch.no_grad():
                logits = plain(path, matrices)(torch.tensor(RECORDED_TOKENS)).logits
            made[f"{name}/logits"] = logits.numpy().astype(np.float32)
    made["versions"] = np.array(
        [
            f"{package} {importlib.metadata.version(package)}"
            for package in ("torch", "transformers", "compressed-tensors", "gptqmodel")
        ]
    )
    np.savez_compressed(GOLDEN, **made)
    print(f"wrote {GOLDEN} of {len(RECORDED)} folders with {', '.join(made['versions'])}")


if __name__ == "__main__":
    main()
