"""How a model's matrices are stored: as floating-point numbers or as integers with scales."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = [
    "DEFAULT_GROUP",
    "FLOATING",
    "GROUP_SIZES",
    "INT8",
    "WeightFormat",
    "WeightFormats",
    "int4",
]

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A quantized matrix `[out, in]`: integers, and scales to multiply them with.

    int8: integers of -127 to 127, int8 `[out, in]`; a scale a row, float32 `[out]`.

    int4: integers n of 0 to 15 that stand for n - 8, packed as `ffjax.packing` says, int32
    `[out, in / 8]`; a scale for every `group_size` inputs of a row, bfloat16 `[out, in /
    group_size]`. In groups of 128, float32 scales would make up 6% of what a step reads,
    and bfloat16 ones 3%; the integers are chosen for the scale as it is rounded, so that
    nothing is lost by it. A scale may be negative.

    Attributes:
        bits: 8 or 4.
        group_size: of int4: 32, 64 or 128. None of int8.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ValueError(f"Quantized weights have 4 or 8 bits, got {self.bits!r}.")
        if self.bits == 8 and self.group_size is not None:
            raise ValueError(
                "int8 weights have one scale a row: their group_size is None, got "
                f"{self.group_size!r}."
            )
        size = self.group_size
        if self.bits == 4 and (type(size) is not int or size not in GROUP_SIZES):
            raise ValueError(
                f"A group of int4 weights has {_listed(GROUP_SIZES)} inputs, got "
                f"group_size={size!r}."
            )

    def __str__(self):
        return "int8" if self.bits == 8 else f"int4 in groups of {self.group_size}"

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
        smaller = [size for size in GROUP_SIZES if all(n % size == 0 for n in (inputs, *others))]
        instead = f"group_size={max(smaller)}" if smaller else "int8, which has no groups"
        return (
            f"Groups of int4 weights are whole: the inputs must be a multiple of "
            f"{self.group_size}; they are {inputs}. Choose {instead}."
        )


INT8 = WeightFormat(bits=8)


def int4(group_size: int = DEFAULT_GROUP) -> WeightFormat:
    """The format int4.

    Raises:
        ValueError: the group size is none of `GROUP_SIZES`.
    """
    return WeightFormat(bits=4, group_size=group_size)


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

    def __str__(self):
        """As in "int8: qkv, down; int4 in groups of 128: gate_up"; empty where all is floating."""
        names: dict[WeightFormat, list[str]] = {}
        for name, value in self.quantized.items():
            names.setdefault(value, []).append(name)
        return "; ".join(f"{value}: {', '.join(which)}" for value, which in names.items())

    @classmethod
    def from_dict(cls, data: Any) -> WeightFormats:
        """The formats that `dataclasses.asdict` made plain data of.

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
