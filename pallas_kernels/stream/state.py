"""What a program carries from tile to tile."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.stream.env import StreamEnv

__all__ = ["NO_TOKEN", "State", "empty_state"]

NO_TOKEN = 2**31 - 1


class State(NamedTuple):
    """A program's registers between two tiles."""

    vectors: Array  # bfloat16 [columns, depth], the segment's operand
    residual: Array  # float32 [owned, rows, Bp], of the groups this program owns
    block: Array  # float32 [owned, rows, Bp], the block's output that is being computed
    best_logit: Array  # float32 [rows, Bp], of the logits so far
    best_token: Array  # int32 [rows, Bp]


def empty_state(env: StreamEnv) -> State:
    """Before the first tile."""
    plan = env.plan
    shape = (plan.rows, plan.padded_batch)
    return State(
        vectors=jnp.zeros((plan.columns, plan.depth), jnp.bfloat16),
        residual=jnp.zeros((plan.owned, *shape), jnp.float32),
        block=jnp.zeros((plan.owned, *shape), jnp.float32),
        best_logit=jnp.full(shape, -jnp.inf, jnp.float32),
        best_token=jnp.full(shape, NO_TOKEN, jnp.int32),
    )
