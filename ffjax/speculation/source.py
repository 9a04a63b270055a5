"""What a source of drafts is, to the block of steps that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jax import Array

__all__ = ["Choosing", "Source"]


class Choosing(NamedTuple):
    """How the model's next tokens will be chosen, for a source that has logits of its own.

    A draft that is chosen by the same noise, penalties and filters is right more often.

    Attributes:
        memory: what came before the newest token, a pytree; `next` takes it and returns it.
        next: takes the memory, the newest token int32 `[B]`, logits float32 `[B, V]` and their
            greedy choice int32 `[B]`, and how many drafts there are before this one, int32.
            Returns the draft, int32 `[B]`, and the memory that goes on.
    """

    memory: Any
    next: Callable[[Any, Array, Array, Array, Array], tuple[Array, Any]]


class Source(Protocol):
    """What drafts come from; hashable, as programs are compiled for it.

    It has no arrays. Those that stay as they are, `weights`, and those that it changes, `state`,
    are arguments of the program; the state is donated, and goes from step to step.

    A head that reads hidden states of the model (EAGLE-3 and others) has its place here, and is
    not there yet. It would name the layers that it reads, as `tokens` names T. The step of several
    tokens returns those, `[B, T, n, D]`: `decode_step(.., hidden_layers=..)`. The block would put
    those of the kept tokens into `state` before it asks for the next drafts, which is where the
    tokens that are kept are known. The rest is as with a draft model.
    """

    @property
    def tokens(self) -> int | None:
        """T, tokens that a step takes of each sequence."""
        ...

    @property
    def always(self) -> bool:
        """Whether each sequence always has drafts: then no step is a plain one."""
        ...

    def drafts(
        self, known: Array, lengths: Array, weights: Any, state: Any, choosing: Choosing | None
    ) -> tuple[Array, Array, Any]:
        """Drafts int32 `[B, T - 1]`, how many of them count, int32 `[B]`, and the state.

        Args:
            known: int32 `[B, S]`, the tokens of each sequence.
            lengths: int32 `[B]`, how many those are: the prompt and one token or more. From call
                to call they grow, by T at most.
            weights: arrays of the source, which stay as they are.
            state: arrays of the source, as the call before has returned them.
            choosing: how the model's tokens are chosen; None where no step follows.
        """
        ...
