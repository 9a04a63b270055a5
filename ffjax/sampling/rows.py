"""What the device gets of the parameters of a batch, a row of arrays for each sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from ffjax.said import say_once
from ffjax.sampling.params import MAX_STOP_TOKENS, SamplingParams
from pallas_kernels.backends import why_no_small_kernels
from pallas_kernels.gpu import Gpu

__all__ = [
    "DRAW_BY_KERNEL",
    "EVERY_TOKEN",
    "Processor",
    "Rows",
    "Stages",
    "drawing_gpu",
    "row_of",
    "rows_of",
]

Processor = Callable[[Array, "Any"], Array]
"""A caller's own stage: takes the logits float32 `[B, V]` and a `ffjax.sampling.choose.Before`,
and returns logits. It is traced."""

EVERY_TOKEN = np.int32(2**31 - 1)
"""What stands for a `top_k` that is off, and for a token id that is none."""

DRAW_BY_KERNEL = True
"""Whether `pallas_kernels.draw` draws on a GPU where tokens are filtered; else XLA does, to the
same effect, which sorts the vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages that a program has; each costs time, and changes nothing for who needs it not.

    Attributes:
        draws: tokens may be drawn.
        filters: unlikely ones may be left out: `top_k`, `top_p`, `min_p`.
        penalizes: it may matter which tokens came before.
        edits: most logits of a sequence that `logit_bias` and forbidden tokens change.
        forbids_stops: tokens that end a sequence may be forbidden at first: `min_tokens`.
        logprobs: how many alternatives' log-probabilities are told; None: not even those of the
            chosen.
        processors: a caller's own.
        gpu: the device, where a kernel draws (`pallas_kernels.draw`); None: XLA does.
    """

    draws: bool = False
    filters: bool = False
    penalizes: bool = False
    edits: int = 0
    forbids_stops: bool = False
    logprobs: int | None = None
    processors: tuple[Processor, ...] = ()
    gpu: Gpu | None = None

    @property
    def plain(self) -> bool:
        """Whether the step's own greedy token is the choice."""
        return not (self.draws or self.changes_logits)

    @property
    def changes_logits(self) -> bool:
        """Whether logits may be changed before one is chosen."""
        return bool(self.penalizes or self.edits or self.forbids_stops or self.processors)

    @property
    def remembers(self) -> bool:
        """Whether the tokens that came before have to be known."""
        return self.penalizes or bool(self.processors)

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        processors: Sequence[Processor] = (),
        gpu: Gpu | None = None,
    ) -> Stages:
        """The stages that a batch of such requests needs.

        `edits` is rounded up to a power of two, so that there are few programs.

        Args:
            params: of each sequence.
            processors: a caller's own.
            gpu: the device, where a kernel is to draw.
        """
        told = [one.logprobs for one in params if one.logprobs is not None]
        edits = max((len(_edits(one)) for one in params), default=0)
        return cls(
            draws=not all(one.greedy for one in params),
            filters=any(one.filters for one in params),
            penalizes=any(one.penalizes for one in params),
            edits=1 << (edits - 1).bit_length() if edits else 0,
            forbids_stops=any(one.min_tokens > 0 for one in params),
            logprobs=max(told) if told else None,
            processors=tuple(processors),
            gpu=gpu,
        )


class Rows(NamedTuple):
    """The parameters of B sequences; arrays of numpy or of JAX.

    Those of a stage that the program does not have are None.

    Attributes:
        seeds: uint32 `[B, 3]`, from `ffjax.sampling.draw.words_of`.
        temperature: float32 `[B]`.
        top_k: int32 `[B]`, `EVERY_TOKEN` where it is off.
        nucleus: float32 `[B, 2]`: `top_p` and `min_p`.
        penalties: float32 `[B, 3]`: of repetition, presence and frequency.
        edit_ids: int32 `[B, edits]`, `EVERY_TOKEN` where there are no more.
        edit_values: float32 `[B, edits]`, added to those logits.
        min_tokens: int32 `[B]`.
        stop_ids: int32 `[B, 2 * MAX_STOP_TOKENS]`, as `edit_ids`.
    """

    seeds: Any = None
    temperature: Any = None
    top_k: Any = None
    nucleus: Any = None
    penalties: Any = None
    edit_ids: Any = None
    edit_values: Any = None
    min_tokens: Any = None
    stop_ids: Any = None


def drawing_gpu(device: Any, implementation: str | None) -> Gpu | None:
    """The device, where the kernel draws: on a GPU that it knows, if `DRAW_BY_KERNEL` says so.

    None where XLA draws. If that is because this JAX cannot compile the kernel, it is said once.

    Args:
        device: a JAX device.
        implementation: what was asked for as that of the steps. Who names "xla" wants XLA all
            along.
    """
    gpu = Gpu.of(device) if DRAW_BY_KERNEL and implementation != "xla" else None
    if gpu is not None and (reason := why_no_small_kernels()) is not None:
        say_once(reason)
        return None
    return gpu


def _edits(params: SamplingParams) -> dict[int, float]:
    """What is added to logits, by token id."""
    return {**dict(params.logit_bias), **dict.fromkeys(params.bad_token_ids, -np.inf)}


def row_of(params: SamplingParams, stops: Sequence[int], stages: Stages) -> Rows:
    """The parameters of one sequence, without the axis `[B]` and without its seed.

    Args:
        params: the parameters.
        stops: the tokens that end it.
        stages: the program's.
    """
    fields: dict[str, Any] = {}
    if stages.draws:
        fields["temperature"] = np.float32(params.temperature)
    if stages.filters:
        fields["top_k"] = np.int32(params.top_k) if params.top_k else EVERY_TOKEN
        fields["nucleus"] = np.array([params.top_p, params.min_p], np.float32)
    if stages.penalizes:
        kinds = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        fields["penalties"] = np.array(kinds, np.float32)
    if stages.edits:
        edits = _edits(params)
        ids = np.full(stages.edits, EVERY_TOKEN)
        values = np.zeros(stages.edits, np.float32)
        ids[: len(edits)], values[: len(edits)] = [*edits], [*edits.values()]
        fields |= {"edit_ids": ids, "edit_values": values}
    if stages.forbids_stops:
        # Those of the model, and those of the request.
        ids = np.full(2 * MAX_STOP_TOKENS, EVERY_TOKEN)
        ids[: len(stops)] = [*stops]
        fields |= {"min_tokens": np.int32(params.min_tokens), "stop_ids": ids}
    return Rows(**fields)


def rows_of(
    params: Sequence[SamplingParams],
    stops: Sequence[Sequence[int]],
    seeds: np.ndarray | None,
    stages: Stages,
) -> Rows:
    """The parameters of a batch.

    Args:
        params: of each sequence.
        stops: the tokens that end each.
        seeds: uint32 `[B, 3]`, from `ffjax.sampling.draw.words_of`; of no use without draws.
        stages: the program's.
    """
    if stages.plain:
        return Rows()
    rows = [row_of(one, ends, stages) for one, ends in zip(params, stops, strict=True)]
    columns = zip(*rows, strict=True)
    stacked = Rows(*(None if column[0] is None else np.stack(column) for column in columns))
    return stacked._replace(seeds=seeds if stages.draws else None)
