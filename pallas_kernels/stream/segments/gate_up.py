"""Gate and up projections and SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.half2 import PLAIN
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.product import Outputs, outputs_of, sum_up
from pallas_kernels.stream.tiles import Flush

__all__ = ["finish_gate_up"]


def finish_gate_up(env: StreamEnv, flush: Flush) -> None:
    """hidden[c] = a(W_gate @ h) * (W_up @ h) with h = rmsnorm(x[c]); a: `Features.activation`."""
    half2 = env.plan.half2
    outputs = outputs_of(env, Segment.GATE_UP, every=2 if half2 else 1)
    hidden = _hidden(env, flush, outputs)
    half, column = env.segment(Segment.GATE_UP).rows // 2, outputs.column
    element = flush.group(outputs.number) * half + outputs.pair
    real = flush.real(outputs.number) & (element < env.dims.ffw_dim)
    real &= column < env.dims.columns
    at, tag = env.exchange.layout, env.tag(flush.layer)
    word = word_in_exchange(env.plan, env.segment(Segment.DOWN), column, element)
    neighbour = _hidden(env, flush, outputs._replace(pair=outputs.pair + 1)) if half2 else None
    for start in (at.ffw, at.ffw_copy)[: env.plan.tuning.hidden_copies]:
        if neighbour is None:
            env.exchange.publish(start + word, hidden, tag, real)
        else:
            env.exchange.publish_half2(start + word, hidden, neighbour, PLAIN, tag, real)


def _hidden(env: StreamEnv, flush: Flush, outputs: Outputs) -> Array:
    """The hidden activations of pairs of rows, float32 `[E]`."""
    gate, up = sum_up(env, Segment.GATE_UP, outputs)
    if env.features.mlp_bias:
        element = flush.group(outputs.number) * (env.segment(Segment.GATE_UP).rows // 2)
        element = jnp.minimum(element + outputs.pair, env.dims.ffw_dim - 1)
        bias = env["gate_up_bias"]
        gate += bias[flush.layer, element].astype(jnp.float32)
        up += bias[flush.layer, element + env.dims.ffw_dim].astype(jnp.float32)
    if env.features.activation == "silu":
        return gate * jax.nn.sigmoid(gate) * up
    return jax.nn.gelu(gate, approximate=True) * up
