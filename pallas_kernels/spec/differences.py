"""How far a kernel's buffer may lie from the specification's, and what is said beyond that.

A difference is rounding if it is within one step of the form that the number was handed over in,
and what a product's float32 sums in another order come to. Such sums also move an activation to the
next bfloat16 now and then: one of some hundred inputs by 2^-9 is a ten-thousandth of the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jax import Array

from pallas_kernels.stream.plan import StreamPlan

__all__ = [
    "COMPUTED",
    "STEP_OF_BFLOAT16",
    "STEP_OF_FLOAT32",
    "WHOLE_LAYER",
    "Difference",
    "find",
    "rms",
    "step_of_residual",
    "steps",
]

# What sums in another order come to, as a part of the root mean square of what is computed.
COMPUTED = 2e-3
# The same of a layer as a whole, whose segments each start from what the one before has made.
WHOLE_LAYER = 1e-2
# From a bfloat16 to the next one, as a part of it, at most; and from a float32.
STEP_OF_BFLOAT16, STEP_OF_FLOAT32 = 2.0**-7, 2.0**-22

_PLACES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("head", "element"),
    "k": ("key/value head", "element"),
    "v": ("key/value head", "element"),
    "parts": ("query head", "KV split", "item"),
    "partial": ("element", "part of the inputs"),
    "best": ("program",),
    "best_token": ("program",),
    "token": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The first element of a buffer that rounding does not explain.

    Attributes:
        layer: from 0 on; L for the head.
        segment: whose work it is: "embed", "qkv", "attention", "attn_out", "gate_up", "down",
            "head"; None where no segment by itself shows it.
        buffer: one of `segments.NAMES`, or "ffw_copy".
        sequence: b.
        token: of the sequence's T.
        place: where in the buffer, after the column.
        got: what the kernel has; NaN where it wrote nothing.
        want: what the specification has.
        allowed: how far apart they may lie.
        count: elements of the buffer that differ by more than is allowed.
        size: elements of the buffer that were compared.
        layers: L.
        written: whether the kernel wrote the element in this layer at all.
        note: one sentence more.
    """

    layer: int
    segment: str | None
    buffer: str
    sequence: int
    token: int
    place: tuple[int, ...]
    got: float
    want: float
    allowed: float
    count: int
    size: int
    layers: int
    written: bool = True
    note: str = ""

    def __str__(self) -> str:
        where = "The head" if self.layer == self.layers else f"Layer {self.layer}"
        if self.segment not in (None, "head"):
            where += f", segment {self.segment}"
        names = _PLACES.get(self.buffer, ("element",))
        parts = [f"sequence {self.sequence}", f"token {self.token}"]
        parts += [f"{name} {at}" for name, at in zip(names, self.place, strict=False)]
        text = f"{where}: '{self.buffer}' differs from the specification. The first place is "
        text += ", ".join(parts) + ". "
        if self.written:
            text += f"The kernel has {self.got:.6g}, the specification {self.want:.6g}; rounding "
            text += f"explains {self.allowed:.2g}. "
        else:
            text += "No program has written it in this layer: its word has another tag. "
        text += f"{self.count} of {self.size} elements differ so."
        return f"{text} {self.note}" if self.note else text


def rms(x: np.ndarray) -> np.ndarray:
    """Root mean square over the last axis, which stays."""
    return np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=-1, keepdims=True))


def step_of_residual(plan: StreamPlan) -> float:
    """From a number of `handed.as_residual` to the next one, as a part of it, at most."""
    return 2.0**-9 if plan.half2 else 2.0**-15


def steps(plan: StreamPlan) -> dict[str, float]:
    """Of each buffer, the step of its form: a part of the number, at most.

    Where two share a word, roots of 10 bits are handed over: 9 bits of a number are left.
    """
    residual, plain = step_of_residual(plan), 2.0**-8 if plan.half2 else 2.0**-15
    return {
        **dict.fromkeys(("x_in", "attn_block", "x_mid", "ffw_block", "x_out"), residual),
        **dict.fromkeys(("attn", "ffw", "ffw_copy"), plain),
        "residual_out": STEP_OF_FLOAT32,
    }


def find(
    plan: StreamPlan,
    layer: int,
    segment: str,
    buffer: str,
    got: np.ndarray | Array,
    want: np.ndarray | Array,
    allowed: np.ndarray | float,
    *,
    there: np.ndarray | None = None,
    compared: np.ndarray | None = None,
    note: str = "",
) -> Difference | None:
    """The first element of two arrays `[C, ..]` that lies too far from the other's.

    Args:
        plan: the whole step's.
        layer: number.
        segment: name.
        buffer: name.
        got: the kernel's.
        want: the specification's.
        allowed: how far apart elements may lie; broadcast.
        there: bool, whether the kernel wrote them; None: it did.
        compared: bool, broadcast along the last axes: which are looked at; None: all.
        note: one sentence more.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    allowed = np.broadcast_to(np.asarray(allowed, np.float64), want.shape)
    with np.errstate(invalid="ignore"):
        near = np.abs(got - want) <= allowed
    near |= (got == want) | (np.isnan(got) & np.isnan(want))
    if there is not None:
        near &= there
    looked = np.ones(want.shape, bool)
    if compared is not None:
        looked &= compared.reshape(*compared.shape, *(1,) * (want.ndim - compared.ndim))
    wrong = np.argwhere(looked & ~near)
    if not len(wrong):
        return None
    at = tuple(int(x) for x in wrong[0])
    sequence, token = divmod(at[0], plan.dims.tokens)
    return Difference(
        layer=layer,
        segment=segment,
        buffer=buffer,
        sequence=sequence,
        token=token,
        place=at[1:],
        got=float(got[at]),
        want=float(want[at]),
        allowed=float(allowed[at]),
        count=len(wrong),
        size=int(looked.sum()),
        layers=plan.dims.num_layers,
        written=there is None or bool(there[at]),
        note=note,
    )
