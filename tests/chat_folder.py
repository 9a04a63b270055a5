"""A small untrained model for conversations: a folder with a tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from hf_folders import write_folder
from hf_models import HFModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["chat_folder"]

_SPECIAL = ["<|end|>", "<|turn|>"]
_TEMPLATE = """\
{%- if tools %}{{ '<|turn|>tools' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- for message in messages %}
    {{- '<|turn|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + (call.function.arguments | tojson) }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}
{%- if mood is defined %}{{ mood }}{% endif %}
"""
_MODEL = HFModel(
    5,
    {
        "vocab_size": 300,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
)


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, return the hello of the user"] * 9, trainer)
    return tokenizer


def chat_folder(directory: Path, **generation: object) -> Path:
    """Writes the folder.

    Args:
        directory: does not exist yet.
        generation: fields of generation_config.json.
    """
    write_folder(directory, _MODEL)
    _tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": _SPECIAL[0], "chat_template": _TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    said = {"eos_token_id": 0} | generation
    (directory / "generation_config.json").write_text(json.dumps(said))
    return directory
