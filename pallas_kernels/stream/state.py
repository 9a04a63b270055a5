"""What a program carries from tile to tile."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.fragments import Fragments, no_fragments
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.product import Sums, outputs_of

__all__ = ["NO_TOKEN", "State", "empty_state"]

NO_TOKEN = 2**31 - 1


class State(NamedTuple):
    """A program's registers between two tiles."""

    activations: Fragments  # the segment's
    residual: Sums  # of the groups this program owns
    block: Sums  # the block's output that is being computed
    best_logit: Array  # float32 [E], of the logits so far
    best_token: Array  # int32 [E]


def empty_state(env: StreamEnv) -> State:
    """Before the first tile."""
    zeros = jnp.zeros(outputs_of(env, Segment.EMBED).pair.shape, jnp.float32)
    shape = outputs_of(env, Segment.HEAD).pair.shape
    return State(
        activations=no_fragments(env),
        residual=Sums(zeros, zeros),
        block=Sums(zeros, zeros),
        best_logit=jnp.full(shape, -jnp.inf, jnp.float32),
        best_token=jnp.full(shape, NO_TOKEN, jnp.int32),
    )
