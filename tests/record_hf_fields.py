"""Records which fields of a config.json transformers reads in each of our families.

Run where transformers is installed; torch is not needed:

    python tests/record_hf_fields.py

Of a family those are the fields of its configuration class, and what the sources of its model and
those that all models share read of an object called config. What it asks of it beyond fields
(methods, properties) is left out. Beside that it records what transformers makes of a few values.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo3", "granite", "gemma2", "gemma3"),
    *("phi3", "smollm3"),
)
SHARED = ("masking_utils.py", "cache_utils.py", "modeling_rope_utils.py")
GOLDEN = Path(__file__).parent / "goldens" / "hf_fields.json"

# Values of eos_token_id, and of is_causal, which masking_utils.py takes as Python's truth.
EOS = ("</s>", -1, [2, 10**6], True, 2.0, [], None, ["2"])
CAUSAL = (True, False, None, 0)


def read_by(source: str) -> set[str]:
    """The attributes that a source reads of anything whose name ends with "config"."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=holder, attr=name) if _is_config(holder):
                names.add(name)
            case ast.Call(func=ast.Name("getattr"), args=[holder, ast.Constant(str(name)), *_]):
                if _is_config(holder):
                    names.add(name)
    return names


def _is_config(node: ast.expr) -> bool:
    match node:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name in ("config", "layer_config", "effective_config", "text_config")
    return False


def record() -> dict:
    """What there is to record."""
    import transformers  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        GenerationConfig,
        PreTrainedConfig,
    )

    root = Path(str(transformers.__file__)).parent
    shared = set().union(*(read_by((root / name).read_text()) for name in SHARED))
    reads = {}
    for family in FAMILIES:
        model_type = "gemma3_text" if family == "gemma3" else family
        cls = type(transformers.AutoConfig.for_model(model_type))
        source = (root / "models" / family / f"modeling_{family}.py").read_text()
        names = shared | read_by(source) | {field.name for field in dataclasses.fields(cls)}
        common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        asked = {
            name
            for name in names
            if isinstance(getattr(cls, name, None), property) or callable(getattr(cls, name, None))
        }
        reads[family] = sorted((names | common) - asked)

    def answer(make, value):
        try:
            return make(value)
        except Exception as error:
            return type(error).__name__

    llama = transformers.LlamaConfig
    return {
        "transformers": transformers.__version__,
        "reads": reads,
        "eos in config": [
            [value, answer(lambda v: llama(eos_token_id=v).eos_token_id, value)] for value in EOS
        ],
        "eos in generation_config": [
            [value, answer(lambda v: GenerationConfig(eos_token_id=v).eos_token_id, value)]
            for value in EOS
        ],
        "causal": [[value, bool(llama(is_causal=value).is_causal)] for value in CAUSAL],
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(record(), indent=1) + "\n")
