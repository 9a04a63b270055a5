"""Hugging Face's config.json to our configuration, and back.

Every field there is read, known to change no number, refused by its name, or named in a warning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from checkpoints.hf_effects import understood
from checkpoints.hf_families import ACTIVATIONS, FAMILIES, NESTED, NUMBERS, Family
from checkpoints.hf_fields import CONFIG, Fields
from checkpoints.hf_files import broken_link, downloaded_json
from checkpoints.hf_rope import read_rope, write_rope
from checkpoints.hf_windows import (
    normal_pattern,
    read_rotating,
    read_window,
    shortest,
    write_rotating,
    write_window,
)
from checkpoints.manifest import MANIFEST, CheckpointError, a_gguf_file
from ffjax.config import ModelConfig

__all__ = ["CONFIG", "architecture_of", "config_from_hf", "config_to_hf", "read_config"]


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    file = directory / CONFIG
    if not file.is_file():
        if (directory / MANIFEST).is_file():
            raise CheckpointError(
                f"{directory} is a checkpoint of ffjax, and no Hugging Face folder. Use it as it "
                "is; `ffjax export` makes a Hugging Face folder of it."
            )
        raise CheckpointError(
            broken_link(directory, CONFIG)
            or a_gguf_file(directory)
            or f"A Hugging Face folder has a {CONFIG}; {directory} has none. Give the folder with "
            "the model's files."
        )
    data = downloaded_json(file)
    if not isinstance(data, dict):
        raise CheckpointError(
            f"A model's {CONFIG} is a JSON object with its fields; {file} is none. Download it "
            "again."
        )
    return data


def architecture_of(data: dict[str, Any], where: Path) -> str:
    """The architecture that a config.json names, one that is supported.

    Raises:
        CheckpointError: it is none of those, or none is named.
    """
    supported = [*(family.architecture for family in FAMILIES.values()), *NESTED]
    match data.get("architectures"):
        case [str(name)]:
            pass
        case None | []:
            kinds = {family.model_type: family.architecture for family in FAMILIES.values()}
            name = kinds.get(data.get("model_type", ""), f"model_type {data.get('model_type')!r}")
        case other:
            name = str(other)
    if name not in supported:
        raise CheckpointError(
            f"The architecture {name} is not supported; supported: {', '.join(supported)}. "
            f"{CONFIG} of {where} asks for it."
        )
    return name


def config_from_hf(
    data: dict[str, Any], where: Path, *, name: str, ignore_fields: Collection[str] = ()
) -> ModelConfig:
    """The configuration that a config.json describes.

    Fields of no known effect are named in one `HFFolderWarning`.

    Args:
        data: what the file holds, in the layout of transformers 4 or 5.
        where: the folder, for messages.
        name: what the model is called in messages.
        ignore_fields: names of fields to leave out, for who knows that they change nothing.

    Raises:
        CheckpointError: it asks for what is not supported, or describes no possible model; or
            a field that is to be ignored is one that is understood.
    """
    architecture = architecture_of(data, where)
    outer: dict[str, Any] = {}
    if architecture in NESTED:
        family_name, key, unused = NESTED[architecture]
        data, outer = _unnested(data, key, unused, where)
    else:
        family_name = next(n for n, f in FAMILIES.items() if f.architecture == architecture)
    family = FAMILIES[family_name]
    _check_ignorable(ignore_fields, family_name, {*data, *outer}, where)
    shadowed = [
        (name, value)
        for name, value in outer.items()
        if name in data and name not in understood(family_name) and name not in ignore_fields
    ]
    data = {name: value for name, value in {**outer, **data}.items() if name not in ignore_fields}
    fields = Fields(data, family.defaults, where)
    kind = fields.take("model_type")
    if architecture not in NESTED and kind not in (None, family.model_type):
        # transformers takes the class of the model_type.
        raise fields.unsupported(f"model_type beside {architecture}", kind, family.model_type)
    fields.drop("architectures", "eos_token_id")  # read above, and by the tokenizer
    made: dict[str, Any] = {"name": name, "family": family_name, **family.ours}
    for number in (*NUMBERS, *family.numbers):
        value = fields.number(number.theirs, number.kind)
        made[number.ours] = None if value is None else number.read(value)
    width, heads = made["model_dim"], made["num_heads"]
    made["num_kv_heads"] = fields.number("num_key_value_heads", "int?") or heads
    made["head_dim"] = fields.number("head_dim", "int?") or _even_share(width, heads, where)
    made["activation"] = _activation(fields, family)
    made["tied_embeddings"] = fields.flag("tie_word_embeddings")
    if family.says_biases:
        made["qkv_bias"] = made["attn_out_bias"] = fields.flag("attention_bias")
        made["mlp_bias"] = fields.flag("mlp_bias")
    if family.scales_embedding:
        made["embed_scale"] = math.sqrt(width)
    rotating = read_rotating(fields, family, made["num_layers"])
    made["rope_pattern"] = shortest(rotating)
    made["window"], made["window_pattern"] = read_window(fields, family, rotating)
    sizes = {name: made[name] for name in ("head_dim", "max_context")}
    rope = read_rope(fields, family, **sizes)
    made["rope_theta"], made["rope_scaling"] = rope.theta, rope.scaling
    made["rotary_pairs"] = rope.pairs
    made["rope_theta_local"] = rope.theta_local if made["window"] is not None else None
    fields.finish(family_name, shadowed)
    try:
        return ModelConfig(**made)
    except ValueError as error:
        raise CheckpointError(
            f"{CONFIG} of {where} describes no possible model: {str(error).rstrip('.')}."
        ) from None


def _unnested(
    data: dict[str, Any], key: str, unused: tuple[str, ...], where: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a model within another, and those of the other that concern it too."""
    inner = data.get(key)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{CONFIG} of {where} lacks {key}, the fields of the text model.")
    return inner, {name: value for name, value in data.items() if name not in (key, *unused)}


def _check_ignorable(
    names: Collection[str], family: str, there: Collection[str], where: Path
) -> None:
    """Whether the fields to be ignored are there, and none of them is understood."""
    if isinstance(names, str):
        raise TypeError(f"ignore_fields is a sequence of names, as ({names!r},); got {names!r}.")
    if known := sorted(understood(family) & set(names)):
        raise CheckpointError(
            f"A field that is understood cannot be ignored, for it says what the model is: "
            f"{', '.join(known)}. Correct it in {CONFIG} of {where}, or leave it there as it is."
        )
    if absent := sorted(set(names) - set(there)):
        raise CheckpointError(
            f"Fields to be ignored are those of {CONFIG}, each named by itself; that of {where} "
            f"has no {', '.join(map(repr, absent))}. Leave it out, or correct its name."
        )


def _even_share(width: int, heads: int, where: Path) -> int:
    if width % heads:
        raise CheckpointError(
            f"{CONFIG} of {where} gives no head_dim, and a hidden_size of {width} does not divide "
            f"among {heads} heads."
        )
    return width // heads


def _activation(fields: Fields, family: Family) -> str:
    name = fields.take(family.activation)
    if name not in ACTIVATIONS:
        raise fields.unsupported(family.activation, name, *ACTIVATIONS)
    # Gemma 2's releases give hidden_act too; transformers reads only the other.
    if family.activation != "hidden_act" and fields.has("hidden_act"):
        other = fields.take("hidden_act")
        if other != name:
            raise fields.unsupported("hidden_act", other, f"{name}, as {family.activation} says")
    return ACTIVATIONS[name]


def config_to_hf(config: ModelConfig, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """A config.json, in the layout that transformers 4 and 5 both read.

    Args:
        config: the configuration.
        dtype: of the weights.
        token_ids: fields like "eos_token_id" to put into it.

    Raises:
        CheckpointError: the family's config.json cannot say what the configuration asks for.
    """
    if (family := FAMILIES.get(config.family)) is None:
        raise CheckpointError(
            f"Hugging Face checkpoints are of the families {', '.join(FAMILIES)}; {config.name} "
            f"is of the family {config.family!r}."
        )
    data: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        **token_ids,
        family.activation: next(t for t, o in ACTIVATIONS.items() if o == config.activation),
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tied_embeddings,
    }
    for number in (*NUMBERS, *family.numbers):
        value = number.theirs_of(getattr(config, number.ours))
        if value is not None or number.kind.endswith("?"):
            data[number.theirs] = value
    if family.says_biases:
        data |= {"attention_bias": config.attn_out_bias, "mlp_bias": config.mlp_bias}
    data.update(write_rope(config, family))
    data.update(write_window(config, family))
    data.update(write_rotating(config, family))
    _check_says_all(config, data)
    return data


def _check_says_all(config: ModelConfig, data: dict[str, Any]) -> None:
    """Whether the config.json, read back, gives the configuration it was made from."""
    back = config_from_hf(data, Path("the export"), name=config.name)
    patterns = {
        "window_pattern": normal_pattern(config),
        "rope_pattern": shortest(list(config.rotating_layers)),
    }
    wanted = dataclasses.replace(config, **patterns)
    differing = [
        f"{field.name}={getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(wanted, field.name) != getattr(back, field.name)
    ]
    if differing:
        raise CheckpointError(
            f"Hugging Face's {CONFIG} of the family {config.family!r} cannot say "
            f"{', '.join(differing)}, as the configuration of {config.name} does."
        )
