"""How a model's matrices are stored: as floating-point numbers or as integers with scales."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

__all__ = [
    "DEFAULT_GROUP",
    "FLOATING",
    "GROUP_SIZES",
    "INT8",
    "INT8_GROUP",
    "Offset",
    "ScaleType",
    "WeightFormat",
    "WeightFormats",
    "int4",
]

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 128
INT8_GROUP = 32
"""Inputs of a group of int8 weights that have groups."""

ScaleType = Literal["bfloat16", "float16", "float32"]
Offset = Literal["zero", "minimum"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A quantized matrix `[out, in]`: integers, and scales to multiply them with.

    int8: integers of -127 to 127, int8 `[out, in]`; a scale a row, float32 `[out]`. In groups,
    integers of -128 to 127 and a 16-bit scale for every 32 inputs of a row, `[out, in / 32]`.

    int4: integers n of 0 to 15, packed as `ffjax.packing` says, int32 `[out, in / 8]`; a 16-bit
    scale s for every `group_size` inputs of a row, `[out, in / group_size]`. In groups of 128,
    float32 scales would make up 6% of what a step reads, and 16-bit ones 3%; integers that ffjax
    makes are chosen for the scale as it is rounded, so that nothing is lost by it. A scale may be
    negative.

    What an int4 integer stands for is s * (n - 8); or, where a group has a second 16-bit number
    beside its scale, `[out, in / group_size, 2]`, s * (n - z) or s * n + m.

    Attributes:
        bits: 8 or 4.
        group_size: inputs that share a scale: of int4 32, 64 or 128; of int8 32, or None.
        scale_dtype: of the scales: "bfloat16" or "float16"; "float32" of int8 without groups.
            None: "bfloat16", or "float32" without groups.
        offset: the second number of a group of int4: "zero", the integer z that stands for 0;
            "minimum", the weight m that n = 0 stands for; None: there is none.
    """

    bits: int
    group_size: int | None = None
    scale_dtype: ScaleType | None = None
    offset: Offset | None = None

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ValueError(f"Quantized weights have 4 or 8 bits, got {self.bits!r}.")
        size = self.group_size
        if self.bits == 8 and size not in (None, INT8_GROUP):
            raise ValueError(
                f"int8 weights have one scale a row, their group_size is None; or groups of "
                f"{INT8_GROUP}. Got group_size={size!r}."
            )
        if self.bits == 4 and (type(size) is not int or size not in GROUP_SIZES):
            raise ValueError(
                f"A group of int4 weights has {_listed(GROUP_SIZES)} inputs, got "
                f"group_size={size!r}."
            )
        known = ("float32",) if size is None else ("bfloat16", "float16")
        if self.scale_dtype is None:
            object.__setattr__(self, "scale_dtype", known[0])
        if self.scale_dtype not in known:
            what = "of a row" if size is None else "of a group"
            raise ValueError(
                f"The scale {what} is {' or '.join(known)}, got scale_dtype={self.scale_dtype!r}."
            )
        if self.offset not in (None, *get_args(Offset)):
            raise ValueError(
                f"A group's offset is 'zero', 'minimum' or None, got offset={self.offset!r}."
            )
        if self.offset is not None and self.bits == 8:
            raise ValueError(
                "int8 weights have no second number beside their scales: offset is None, got "
                f"{self.offset!r}."
            )

    def shape_of_scales(self, out: int, inputs: int) -> tuple[int, ...]:
        """Of a matrix `[out, in]`, the shape of its scales, and of what lies beside them."""
        if self.group_size is None:
            return (out,)
        return (out, inputs // self.group_size, *((2,) if self.offset else ()))

    def __str__(self):
        if self.group_size is None:
            return "int8"
        said = f"int{self.bits} in groups of {self.group_size}"
        more = [] if self.scale_dtype == "bfloat16" else ["float16 scales"]
        if self.offset is not None:
            more.append({"zero": "zero points", "minimum": "minima"}[self.offset])
        return " with ".join([said, " and ".join(more)] if more else [said])

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, without those that a format has anyway."""
        usual = "float32" if self.group_size is None else "bfloat16"
        made: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        if self.scale_dtype != usual:
            made["scale_dtype"] = self.scale_dtype
        if self.offset is not None:
            made["offset"] = self.offset
        return made

    def why_not(self, inputs: int, *others: int) -> str | None:
        """Why a matrix of so many inputs cannot have this format, a sentence; None if it can.

        Args:
            inputs: of the matrix.
            others: those of matrices that are to have the same format, for the advice.

        Returns:
            The sentence, or None.
        """
        if self.group_size is None or inputs % self.group_size == 0:
            return None
        sizes = GROUP_SIZES if self.bits == 4 else ()
        smaller = [size for size in sizes if all(n % size == 0 for n in (inputs, *others))]
        instead = f"group_size={max(smaller)}" if smaller else "int8, which has no groups"
        if self.bits == 8:
            instead = "int8 with a scale a row"
        return (
            f"Groups of int{self.bits} weights are whole: the inputs must be a multiple of "
            f"{self.group_size}; they are {inputs}. Choose {instead}."
        )


INT8 = WeightFormat(bits=8)


def int4(
    group_size: int = DEFAULT_GROUP,
    scale_dtype: ScaleType = "bfloat16",
    offset: Offset | None = None,
) -> WeightFormat:
    """The format int4.

    Raises:
        ValueError: the group size is none of `GROUP_SIZES`, or there is no such scale or offset.
    """
    return WeightFormat(bits=4, group_size=group_size, scale_dtype=scale_dtype, offset=offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormats:
    """The formats of a model's matrices. None: floating-point, in the model's dtype.

    The embedding, norms and biases have no format: they are floating-point in every model.

    Attributes:
        qkv, attn_out, gate_up, down: of the layers.
        head: of a head that is not the embedding.
    """

    qkv: WeightFormat | None = None
    attn_out: WeightFormat | None = None
    gate_up: WeightFormat | None = None
    down: WeightFormat | None = None
    head: WeightFormat | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not isinstance(value, WeightFormat):
                raise ValueError(
                    f"WeightFormats.{field.name} is a WeightFormat or None, got {value!r}."
                )

    @classmethod
    def of_layers(
        cls, layers: WeightFormat | None, head: WeightFormat | None = None
    ) -> WeightFormats:
        """The same format for all matrices of the layers.

        Args:
            layers: their format; None leaves them as they are.
            head: the head's; None leaves it as it is.

        Returns:
            A format for each matrix.
        """
        return cls(qkv=layers, attn_out=layers, gate_up=layers, down=layers, head=head)

    @property
    def quantized(self) -> dict[str, WeightFormat]:
        """The matrices that are quantized, by name; empty where none is."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in pairs if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The formats as plain data; `from_dict` is its inverse."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: None if value is None else value.to_dict() for name, value in pairs}

    def __str__(self):
        """As in "int8: qkv, down; int4 in groups of 128: gate_up"; empty where all is floating."""
        names: dict[WeightFormat, list[str]] = {}
        for name, value in self.quantized.items():
            names.setdefault(value, []).append(name)
        return "; ".join(f"{value}: {', '.join(which)}" for value, which in names.items())

    @classmethod
    def from_dict(cls, data: Any) -> WeightFormats:
        """The formats that `to_dict` made plain data of.

        Args:
            data: formats by the matrices' names; a format is a table of its fields, or None.

        Returns:
            The formats.

        Raises:
            ValueError: the data is no table of formats.
        """
        formats = _table("weights", cls, data)
        return cls(
            **{
                name: None
                if value is None
                else WeightFormat(**_table(f"weights.{name}", WeightFormat, value))
                for name, value in formats.items()
            }
        )


FLOATING = WeightFormats()
"""Nothing is quantized."""


def _table(name: str, kind: type, data: Any) -> dict[str, Any]:
    """The data, if it is a table of fields that the dataclass has."""
    known = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(data, dict) or not set(data) <= set(known):
        raise ValueError(f"{name} is a table of the fields {', '.join(known)}; got {data!r}.")
    if kind is WeightFormat and "bits" not in data:
        raise ValueError(f"{name} needs bits, got {data!r}.")
    return data


def _listed(values: Any) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}"
