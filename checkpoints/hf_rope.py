"""Rotary frequencies: Hugging Face's rope_theta, rope_scaling and rope_parameters as ours."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from checkpoints.hf_families import Family
from checkpoints.hf_fields import Fields, warn
from ffjax.config import (
    AnyRopeScaling,
    LinearRopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)

__all__ = [
    "Rope",
    "growth_of_long",
    "growth_of_yarn",
    "part_of_head",
    "read_rope",
    "write_rope",
]

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_ORIGINAL, _PART = "original_max_position_embeddings", "partial_rotary_factor"

# Of each supported type, the fields of its table.
_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("truncate", _ORIGINAL),
    ),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", _ORIGINAL),
    "dynamic": ("factor",),
}
# Of YaRN's table; 0 is as good as none.
_WEIGHTS = ("mscale", "mscale_all_dim")
# Of Phi 3, and what its older files call LongRoPE.
_PHI3_TYPES = ("default", "longrope")
_PHI3_NAMES = {"su": "longrope", "yarn": "longrope"}


class Rope(NamedTuple):
    """The rotary fields of `ModelConfig`.

    Attributes:
        theta: base of the frequencies.
        theta_local: that of local layers, or None.
        scaling: how the frequencies are stretched, or None.
        pairs: how many pairs of a head are rotated, or None.
    """

    theta: float
    theta_local: float | None
    scaling: AnyRopeScaling | None
    pairs: int | None = None


class _Sizes(NamedTuple):
    """What a table of rotary fields is read with.

    Attributes:
        family: the family.
        head_dim: H.
        max_context: the model's positions.
        original: those of pretraining, where config.json has them beside the table.
        part: of each head that is rotated, where config.json has it beside the table.
    """

    family: Family
    head_dim: int
    max_context: int
    original: int | None
    part: float


class _Table(NamedTuple):
    theta: float
    scaling: AnyRopeScaling | None
    pairs: int | None


def read_rope(fields: Fields, family: Family, *, head_dim: int, max_context: int) -> Rope:
    """The rotary fields of a config.json, in the layout of transformers 4 or 5.

    Args:
        fields: the config.json.
        family: the family.
        head_dim: H.
        max_context: where nothing says what the context of pretraining is, it is this.

    Raises:
        CheckpointError: they ask for what is not supported.
    """
    # transformers 4 has rope_theta and, for what is stretched, rope_scaling; transformers 5 has
    # both in rope_parameters, in families with local frequencies a table for each kind of layer.
    old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
    theta = fields.number("rope_theta", "float")
    original = None if family.local_rope else fields.number(_ORIGINAL, "int?")
    part = fields.number(_PART, "float") if family.partial_rope else 1.0
    sizes = _Sizes(family, head_dim, max_context, original, part)
    if family.local_rope:
        return _two_ropes(fields, sizes, old, new, theta)
    if old is None or new is None:
        old = new if old is None else old
    elif _read_table(fields, old, theta, sizes) != _read_table(fields, new, theta, sizes):
        raise fields.unsupported("rope_scaling beside another rope_parameters", old, "one of them")
    table = _read_table(fields, old, theta, sizes)
    return Rope(table.theta, None, table.scaling, table.pairs)


def _two_ropes(fields: Fields, sizes: _Sizes, old: Any, new: Any, theta: float) -> Rope:
    """The rotary fields of a family whose local layers rotate in a way of their own."""
    usual = sizes.family.defaults["rope_theta"]
    if sizes.family.local_rope == "own":
        local_theta = fields.number("rope_local_base_freq", "float")
    else:
        local_theta = theta if new is None else usual
        if new is None and theta != usual:
            # transformers 4 gives local layers this base too, 5 the usual one.
            raise fields.unsupported("rope_theta outside of rope_parameters", theta, usual)
    if new is not None and old is not None:
        raise fields.unsupported("rope_scaling beside rope_parameters", old, "one of them")
    if new is not None:
        kinds = _table(fields, "rope_parameters", new, (_GLOBAL, _LOCAL))
        old = kinds.get(_GLOBAL)
        near = kinds.get(_LOCAL)
        local_theta, stretched, _ = _read_table(fields, near, local_theta, sizes)
        if stretched is not None:
            raise fields.unsupported(f"{_LOCAL} with the rope_scaling", near, "default")
    theta, scaling, _ = _read_table(fields, old, theta, sizes)
    if sizes.family.local_rope == "plain" and scaling is None and theta == local_theta:
        return Rope(theta, None, None)
    return Rope(theta, local_theta, scaling)


def _table(fields: Fields, what: str, table: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """The table, if it asks for nothing but what is known."""
    if not isinstance(table, dict):
        raise fields.unsupported(what, table, "a table of fields")
    for name, value in table.items():
        if name not in known and value is not None:
            raise fields.unsupported(f"{what} with {name}", value, ", ".join(known))
    return table


def _read_table(fields: Fields, table: Any, theta: float, sizes: _Sizes) -> _Table:
    """Base, stretching and rotated pairs of one table; `theta` where it gives none."""
    if table is None:
        table = {}
    if not isinstance(table, dict):
        raise fields.unsupported("rope_scaling", table, "a table of fields, null")
    partial = sizes.family.partial_rope
    kind = table.get("rope_type", table.get("type", "default"))
    if partial:
        kind = _PHI3_NAMES.get(kind, kind)
    supported = _PHI3_TYPES if partial else tuple(_TYPES)
    if not isinstance(kind, str) or kind not in supported:
        raise fields.unsupported("rope_scaling type", kind, *supported)
    known = ("rope_type", "type", "rope_theta", _PART, *_TYPES[kind])
    table = _table(fields, f"rope_scaling of type {kind!r}", table, known)
    if (part := table.get(_PART)) not in (None, 1) and not partial:
        raise fields.unsupported(_PART, part, 1.0)
    original = sizes.max_context if sizes.original is None else sizes.original
    said = {name: value for name, value in table.items() if value is not None}
    if sizes.original is not None:
        # transformers takes the one beside the table, whatever the table says.
        said[_ORIGINAL] = original
    said = {name: value for name, value in said.items() if value or name not in _WEIGHTS}
    usual = {"rope_theta": theta, _ORIGINAL: original, _PART: sizes.part}
    inner = Fields(said, usual, fields.where)
    theta = inner.number("rope_theta", "float")
    pairs = _pairs(fields, inner.number(_PART, "float"), sizes.head_dim)
    scaling = _scaling(fields, kind, inner, sizes, pairs or sizes.head_dim // 2)
    return _Table(theta, scaling, pairs)


def _pairs(fields: Fields, part: float, head_dim: int) -> int | None:
    """How many pairs of a head are rotated, or None: all."""
    rotated = int(head_dim * part)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise fields.unsupported(
            _PART, part, f"what makes an even number of the {head_dim} elements of a head"
        )
    return None if rotated == head_dim else rotated // 2


def _scaling(
    fields: Fields, kind: str, inner: Fields, sizes: _Sizes, pairs: int
) -> AnyRopeScaling | None:
    """The stretching that a table asks for."""
    if kind == "default":
        return None
    if kind == "longrope":
        return _long(fields, inner, sizes.max_context, pairs)
    factor = inner.number("factor", "float")
    if kind == "linear":
        return LinearRopeScaling(factor=factor)
    if kind == "llama3":
        return RopeScaling(
            factor=factor,
            low_freq_factor=inner.number("low_freq_factor", "float"),
            high_freq_factor=inner.number("high_freq_factor", "float"),
            original_context=inner.number(_ORIGINAL, "int"),
        )
    if kind == "yarn":
        return _yarn(fields, inner, factor, nested=bool(sizes.family.local_rope))
    warn(
        f"The rope_scaling of type 'dynamic' (factor {factor:g}) of {fields.where} changes "
        f"frequencies with the length of a text of more than {sizes.max_context} tokens. It is "
        "left out: the model takes that many, of which it changes nothing."
    )
    return None


def _yarn(fields: Fields, inner: Fields, factor: float, *, nested: bool) -> YarnRopeScaling:
    """YaRN, as transformers' `_compute_yarn_parameters` reads it."""
    attention = inner.number("attention_factor", "float?")
    above, below = inner.number("mscale", "float?"), inner.number("mscale_all_dim", "float?")
    if attention is None:
        attention = growth_of_yarn(factor)
        if above is not None and below is not None:
            attention = growth_of_yarn(factor, above) / growth_of_yarn(factor, below)
    truncate = True if (said := inner.take("truncate")) is None else said
    if not isinstance(truncate, bool) or (nested and not truncate):
        # transformers looks for it beside the tables of the kinds of layers.
        raise fields.unsupported("rope_scaling with truncate", said, True)
    return YarnRopeScaling(
        factor=factor,
        original_context=inner.number(_ORIGINAL, "int"),
        beta_fast=inner.number("beta_fast", "float?") or 32.0,
        beta_slow=inner.number("beta_slow", "float?") or 1.0,
        truncate=truncate,
        attention_factor=attention,
    )


def _long(fields: Fields, inner: Fields, max_context: int, pairs: int) -> LongRopeScaling:
    """LongRoPE, as transformers' `_compute_longrope_parameters` reads it."""
    original = inner.number(_ORIGINAL, "int")
    factor, attention = inner.number("factor", "float?"), inner.number("attention_factor", "float?")
    if attention is None:
        attention = growth_of_long(factor or max_context / original, original)

    def factors(name: str) -> tuple[float, ...]:
        value = inner.take(name)
        numbers = isinstance(value, list) and all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf
            for x in value
        )
        if not numbers or len(value) != pairs:
            raise fields.unsupported(
                f"rope_scaling with {name}", value, f"{pairs} positive numbers, one a rotated pair"
            )
        return tuple(map(float, value))

    return LongRopeScaling(
        short_factors=factors("short_factor"),
        long_factors=factors("long_factor"),
        original_context=original,
        attention_factor=attention,
    )


def growth_of_yarn(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by, where nothing says it."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def growth_of_long(factor: float, original: int) -> float:
    """What LongRoPE multiplies cosines and sines by, where nothing says it."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(max(2, original)))


def part_of_head(rotated: int, head_dim: int) -> float:
    """The partial_rotary_factor that makes so many of a head's elements, rounded down."""
    part = rotated / head_dim
    return part if int(head_dim * part) == rotated else math.nextafter(part, 1)


def rope_in(config: ModelConfig) -> Rope:
    """The rotary fields of our configuration."""
    c = config
    return Rope(c.rope_theta, c.rope_theta_local, c.rope_scaling, c.rotary_pairs)


def write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The rotary fields of a config.json, in the layout of transformers 4, which 5 reads too.

    Args:
        config: the model's configuration.
        family: its family.
    """
    rope = rope_in(config)
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.theta_local is not None and family.local_rope == "own":
        fields["rope_local_base_freq"] = rope.theta_local
    if family.partial_rope:
        rotated = config.head_dim if rope.pairs is None else 2 * rope.pairs
        fields[_PART] = part_of_head(rotated, config.head_dim)
        fields[_ORIGINAL] = config.max_context
    match rope.scaling:
        case YarnRopeScaling() as scaling:
            fields["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                _ORIGINAL: scaling.original_context,
            }
            if not scaling.truncate:
                fields["rope_scaling"]["truncate"] = False
        case LongRopeScaling() as scaling:
            original = scaling.original_context
            # transformers 4 wants these three alone in Phi 3's table.
            fields["rope_scaling"] = {
                "type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
            }
            usual = growth_of_long(config.max_context / original, original)
            if scaling.attention_factor != usual:
                fields["rope_scaling"]["attention_factor"] = scaling.attention_factor
            if family.partial_rope:
                fields[_ORIGINAL] = original
            else:
                fields["rope_scaling"][_ORIGINAL] = original
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
