"""Records what Hugging Face transformers computes for the models of `hf_models.py`.

Run it where torch and transformers are installed (jax and ffjax need not be); the tests read
what it writes, and need neither:

    pip install torch==2.13.0 transformers==5.23.0
    python tests/record_hf_logits.py [NAME ...]

Without names it records all of them. Each model gives `goldens/NAME.npz`: `tokens` int32
`[B, T]`, `logits` float32 `[B, T, V]`, and the versions of torch and transformers.
`goldens/rope.npz` holds the rotary frequencies of the released Llama models, float32 `[H/2]` by
preset.
"""

# The environments that check types and run the tests have no torch.
# pyright: reportMissingImports=false

from __future__ import annotations

import sys

import numpy as np
import torch
import transformers
from hf_models import GOLDENS, LLAMA_ROPES, MODELS, HFModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


def build(model: HFModel) -> transformers.PreTrainedModel:
    """The model in transformers, float32, its plainest attention.

    Raises:
        RuntimeError: a tensor is missing, or there is one too many.
    """
    config = transformers.AutoConfig.for_model(model.family, **model.settings)
    built = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    state = {name: torch.from_numpy(x) for name, x in model.weights().items()}
    missing, unexpected = built.load_state_dict(state, strict=False)
    tied = model.settings["tie_word_embeddings"]
    if unexpected or missing != (["lm_head.weight"] if tied else []):
        raise RuntimeError(f"Tensors differ: missing {missing}, unexpected {unexpected}.")
    if tied != (built.lm_head.weight is built.model.embed_tokens.weight):
        raise RuntimeError("The head is tied where it should not be, or the other way round.")
    return built


def logits(model: HFModel) -> np.ndarray:
    """Logits float32 `[B, T, V]` of the whole sequences.

    Raises:
        RuntimeError: transformers computes others step by step.
    """
    built, tokens = build(model), torch.from_numpy(model.tokens()).long()
    whole = built(tokens, use_cache=False).logits
    cache, steps = None, []
    count = tokens.shape[1]
    for column in tokens.split([model.fed_first] + [1] * (count - model.fed_first), dim=1):
        out = built(column, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    difference = (torch.cat(steps, dim=1) - whole).abs().max() / whole.abs().max()
    if not difference < 1e-5:
        raise RuntimeError(f"Step by step, logits differ by {difference}.")
    return whole.numpy()


def frequencies(settings: dict) -> np.ndarray:
    """Rotary frequencies float32 `[H/2]` of a config's settings."""
    return LlamaRotaryEmbedding(transformers.LlamaConfig(**settings)).inv_freq.numpy()


def main(names: list[str]) -> None:
    GOLDENS.mkdir(exist_ok=True)
    with torch.no_grad():
        for name in names or MODELS:
            model = MODELS[name]
            recorded = {"tokens": model.tokens(), "logits": logits(model)}
            np.savez(GOLDENS / f"{name}.npz", **recorded, **VERSIONS)
            print(f"{name}: logits {recorded['logits'].shape}")
        if not names:
            ropes = {name: frequencies(settings) for name, settings in LLAMA_ROPES.items()}
            np.savez(GOLDENS / "rope.npz", **ropes, **VERSIONS)
            print(f"rope: {', '.join(ropes)}")


if __name__ == "__main__":
    main(sys.argv[1:])
