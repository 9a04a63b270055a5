"""Records what peft writes and merges of the adapters of `lora_cases.py`.

Run it where torch, transformers and peft are installed (jax and ffjax need not be); the tests
read what it writes, and need none of them:

    pip install torch==2.14.1 transformers==5.24.0 peft==0.21.2
    python tests/record_lora.py

It writes `goldens/lora.npz`, bytes of files by case and name: the two files of the adapter as
peft wrote them; and, as safetensors, each tensor that differs from the model's after
`merge_and_unload`: `float32` of the model loaded as float32, `bfloat16` of the model loaded as
bfloat16 (the bits, as uint16).
"""

# The environments that check types and run the tests have no torch.
# pyright: reportMissingImports=false

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from lora_cases import BASE, CASES, GOLDEN, matrix
from record_hf_logits import build
from safetensors.torch import save

VERSIONS = {module.__name__: module.__version__ for module in (torch, transformers, peft)}


def write(case: dict[str, Any], directory: Path) -> None:
    """Has peft write an adapter, with numbers of ours in its matrices."""
    model = peft.get_peft_model(build(BASE), peft.LoraConfig(task_type="CAUSAL_LM", **case))
    named = [(name, x) for name, x in model.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(named):
            parameter.copy_(torch.from_numpy(matrix(seed, tuple(parameter.shape))))
        for name, parameter in model.named_parameters():
            # peft keeps those of the head and the embedding with the adapter: not the model's.
            if "layers" not in name and name.endswith("base_layer.weight"):
                parameter.mul_(0.75)
    model.save_pretrained(directory)


def merged(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that an adapter changes, merged into a model of a dtype."""
    before = {name: x.clone() for name, x in build(BASE).to(dtype).state_dict().items()}
    model = peft.PeftModel.from_pretrained(build(BASE).to(dtype), directory)
    after = model.merge_and_unload().state_dict()
    if before.keys() != after.keys() or {x.dtype for x in after.values()} != {dtype}:
        raise RuntimeError("The merged model has other tensors, or other dtypes.")
    return {name: x for name, x in after.items() if not torch.equal(x, before[name])}


def main() -> None:
    """Records all cases."""
    arrays: dict[str, Any] = {"versions": np.array(str(VERSIONS))}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            write(case, directory)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                arrays[f"{name}/{file}"] = np.frombuffer((directory / file).read_bytes(), np.uint8)
            for dtype in ("float32", "bfloat16"):
                tensors = merged(directory, getattr(torch, dtype))
                if dtype == "bfloat16":
                    tensors = {key: x.view(torch.uint16) for key, x in tensors.items()}
                content = save(tensors)
                arrays[f"{name}/{dtype}"] = np.frombuffer(content, np.uint8)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {len(arrays)} arrays, {VERSIONS}")


if __name__ == "__main__":
    main()
