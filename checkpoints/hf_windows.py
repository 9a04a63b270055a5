"""Which layers are local: Hugging Face's sliding windows as ours."""

from __future__ import annotations

from typing import Any

from checkpoints.hf_families import Family
from checkpoints.hf_fields import Fields
from ffjax.config import ModelConfig

__all__ = [
    "normal_pattern",
    "read_rotating",
    "read_window",
    "shortest",
    "write_rotating",
    "write_window",
]

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

# transformers 4.5x wrote Gemma 3's field under its private name, beside the layer_types that it
# reads instead.
_PATTERN_FIELDS = ("sliding_window_pattern", "_sliding_window_pattern")


def read_window(
    fields: Fields, family: Family, rotating: list[bool]
) -> tuple[int | None, tuple[bool, ...]]:
    """Window and pattern as `ModelConfig` has them.

    Args:
        fields: the config.json.
        family: the family.
        rotating: for each of the L layers, whether it rotates; from `read_rotating`.

    Raises:
        CheckpointError: the fields contradict each other, or ask for what is not supported.
    """
    num_layers = len(rotating)
    window, local = _by_rule(fields, family, rotating)
    if (types := fields.take("layer_types")) is not None:
        if unknown := sorted({str(kind) for kind in types} - {_LOCAL, _GLOBAL}):
            raise fields.unsupported("layer_types", unknown[0], _LOCAL, _GLOBAL)
        if len(types) != num_layers:
            raise fields.unsupported(
                "layer_types of length", len(types), f"{num_layers}, one a layer"
            )
        listed = [kind == _LOCAL for kind in types]
        if family.windows in ("never", "always") and listed != local:
            # transformers does not look at them in these families.
            raise fields.unsupported("layer_types", types[listed.index(not local[0])], "all alike")
        if any(listed) and window is None:
            raise fields.unsupported("layer_types with no sliding_window", _LOCAL, _GLOBAL)
        local = listed
    if window is None or not any(local):
        return None, (True,)
    return window, shortest(local)


def _by_rule(fields: Fields, family: Family, rotating: list[bool]) -> tuple[int | None, list[bool]]:
    """The window, and which layers are local where no `layer_types` says it."""
    num_layers = len(rotating)
    if family.windows == "never":
        return None, [False] * num_layers
    window = fields.number("sliding_window", "int?")
    if family.windows == "always":
        return window, [window is not None] * num_layers
    if family.windows == "unrotated":
        window = window if fields.flag("use_sliding_window") else None
        return window, [window is not None and not rotates for rotates in rotating]
    if family.windows == "from":
        # Released models name a window and do not use it.
        window = window if fields.flag("use_sliding_window") else None
        first = fields.take("max_window_layers")
        if type(first) is not int or first < 0:
            raise fields.unsupported("max_window_layers", first, "0 and positive integers")
        return window, [window is not None and i >= first for i in range(num_layers)]
    every = next((name for name in _PATTERN_FIELDS if fields.has(name)), _PATTERN_FIELDS[0])
    count = fields.number(every, "int")
    for name in _PATTERN_FIELDS:
        if fields.has(name) and (other := fields.take(name)) != count:
            raise fields.unsupported(name, other, f"{count}, as {every} says")
    usual = family.defaults[_PATTERN_FIELDS[0]]
    unread = every != _PATTERN_FIELDS[0] or not family.reads_pattern
    if unread and count != usual and not fields.has("layer_types"):
        # transformers computes the usual one.
        raise fields.unsupported(f"{every} without layer_types", count, usual)
    return window, [window is not None and (i + 1) % count != 0 for i in range(num_layers)]


def read_rotating(fields: Fields, family: Family, num_layers: int) -> list[bool]:
    """For each layer, whether it rotates queries and keys by their positions.

    Args:
        fields: the config.json.
        family: the family.
        num_layers: L.

    Raises:
        CheckpointError: the fields ask for what is not supported.
    """
    if not family.names_unrotated:
        return [True] * num_layers
    every = fields.number("no_rope_layer_interval", "int")
    if (listed := fields.take("no_rope_layers")) is None:
        return [(i + 1) % every != 0 for i in range(num_layers)]
    # 1 stands for a layer that rotates, whatever the name says; transformers reads the first L.
    good = isinstance(listed, list) and all(one in (0, 1) for one in listed)
    if not good or len(listed) < num_layers:
        raise fields.unsupported(
            "no_rope_layers", listed, f"null, or 1 or 0 for each of {num_layers} layers"
        )
    return [one == 1 for one in listed[:num_layers]]


def write_rotating(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The fields of config.json for the layers that rotate."""
    if not family.names_unrotated:
        return {}
    return {"no_rope_layers": [int(rotates) for rotates in config.rotating_layers]}


def shortest(layers: list[bool]) -> tuple[bool, ...]:
    """The shortest pattern that, repeated, gives the layers."""
    for length in range(1, len(layers)):
        if all(layers[i] == layers[i % length] for i in range(len(layers))):
            return tuple(layers[:length])
    return tuple(layers)


def normal_pattern(config: ModelConfig) -> tuple[bool, ...]:
    """The shortest pattern with the same local layers as the configuration's."""
    return (True,) if config.window is None else shortest(list(config.local_layers))


def write_window(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The fields of config.json for the configuration's local layers."""
    if family.windows == "never":
        return {}
    if family.windows == "always":
        return {"sliding_window": config.window}
    local = config.local_layers
    fields: dict[str, Any] = {
        "sliding_window": config.window,
        "layer_types": [_LOCAL if here else _GLOBAL for here in local],
    }
    if family.windows == "unrotated":
        fields["use_sliding_window"] = config.window is not None
    elif family.windows == "from":
        first = local.index(True) if any(local) else len(local)
        fields |= {"use_sliding_window": config.window is not None, "max_window_layers": first}
    elif config.window is not None and len(pattern := normal_pattern(config)) > 1:
        fields["sliding_window_pattern"] = len(pattern)
    return fields
