"""Rotary frequencies: Hugging Face's rope_theta, rope_scaling and rope_parameters as ours."""

from __future__ import annotations

from typing import Any, NamedTuple

from checkpoints.hf_fields import Fields
from ffjax.config import LinearRopeScaling, RopeScaling

__all__ = ["Rope", "read_rope", "write_rope"]

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

# Of each supported type, the fields of its table.
_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


class Rope(NamedTuple):
    """The rotary fields of `ModelConfig`.

    Attributes:
        theta: base of the frequencies.
        theta_local: that of local layers, or None.
        scaling: how the frequencies are stretched, or None.
    """

    theta: float
    theta_local: float | None
    scaling: RopeScaling | LinearRopeScaling | None


def read_rope(fields: Fields, max_context: int, *, local: bool) -> Rope:
    """The rotary fields of a config.json, in the layout of transformers 4 or 5.

    Args:
        fields: the config.json.
        max_context: where a table leaves out the context of pretraining, it is this.
        local: whether the family's local layers have frequencies of their own.

    Raises:
        CheckpointError: they ask for what is not supported.
    """
    # transformers 4 has rope_theta and, for what is stretched, rope_scaling; transformers 5 has
    # both in rope_parameters, in families with local frequencies a table for each kind of layer.
    old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
    theta, local_theta = fields.number("rope_theta", "float"), None
    if local:
        local_theta = fields.number("rope_local_base_freq", "float")
        if new is not None and old is not None:
            raise fields.unsupported("rope_scaling beside rope_parameters", old, "one of them")
        if new is not None:
            kinds = _table(fields, "rope_parameters", new, (_GLOBAL, _LOCAL))
            old = kinds.get(_GLOBAL)
            near = kinds.get(_LOCAL)
            local_theta, stretched = _read_table(fields, near, local_theta, max_context)
            if stretched is not None:
                raise fields.unsupported(f"{_LOCAL} with the rope_scaling", near, "default")
    elif old is None or new is None:
        old = new if old is None else old
    elif _read_table(fields, old, theta, max_context) != _read_table(
        fields, new, theta, max_context
    ):
        raise fields.unsupported("rope_scaling beside another rope_parameters", old, "one of them")
    theta, scaling = _read_table(fields, old, theta, max_context)
    return Rope(theta, local_theta, scaling)


def _table(fields: Fields, what: str, table: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """The table, if it asks for nothing but what is known."""
    if not isinstance(table, dict):
        raise fields.unsupported(what, table, "a table of fields")
    for name, value in table.items():
        if name not in known and value is not None:
            raise fields.unsupported(f"{what} with {name}", value, ", ".join(known))
    return table


def _read_table(
    fields: Fields, table: Any, theta: float, max_context: int
) -> tuple[float, RopeScaling | LinearRopeScaling | None]:
    """Base and stretching of one table; `theta` where it gives none."""
    if table is None:
        return theta, None
    if not isinstance(table, dict):
        raise fields.unsupported("rope_scaling", table, "a table of fields, null")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in _TYPES:
        raise fields.unsupported("rope_scaling type", kind, *_TYPES)
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_TYPES[kind])
    table = _table(fields, f"rope_scaling of type {kind!r}", table, known)
    if (part := table.get("partial_rotary_factor")) not in (None, 1):
        raise fields.unsupported("partial_rotary_factor", part, 1.0)
    inner = Fields(
        {name: value for name, value in table.items() if value is not None},
        {"rope_theta": theta, "original_max_position_embeddings": max_context},
        fields.where,
    )
    theta = inner.number("rope_theta", "float")
    if kind == "default":
        return theta, None
    factor = inner.number("factor", "float")
    if kind == "linear":
        return theta, LinearRopeScaling(factor=factor)
    return theta, RopeScaling(
        factor=factor,
        low_freq_factor=inner.number("low_freq_factor", "float"),
        high_freq_factor=inner.number("high_freq_factor", "float"),
        original_context=inner.number("original_max_position_embeddings", "int"),
    )


def write_rope(rope: Rope) -> dict[str, Any]:
    """The rotary fields of a config.json, in the layout of transformers 4, which 5 reads too."""
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.theta_local is not None:
        fields["rope_local_base_freq"] = rope.theta_local
    match rope.scaling:
        case LinearRopeScaling(factor=factor):
            fields["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case RopeScaling() as scaling:
            fields["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    return fields
