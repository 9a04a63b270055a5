"""Gate and up projections and SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import jax

from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.lanes import place_in_mail
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.product import Outputs, Sums
from pallas_kernels.stream.tiles import Flush

__all__ = ["finish_gate_up"]


def finish_gate_up(env: StreamEnv, flush: Flush, outputs: Outputs, sums: Sums) -> None:
    """hidden[b] = silu(W_gate @ h) * (W_up @ h) with h = rmsnorm(x[b]); or with GELU."""
    gate, up = sums
    if env.features.activation == "silu":
        hidden = gate * jax.nn.sigmoid(gate) * up
    else:
        hidden = jax.nn.gelu(gate, approximate=True) * up
    half, b = env.segment(Segment.GATE_UP).rows // 2, outputs.sequence
    element = flush.group(outputs.number) * half + outputs.pair
    real = flush.real(outputs.number) & (element < env.dims.ffw_dim) & (b < env.dims.batch)
    place = place_in_mail(env.plan, env.segment(Segment.DOWN), element)
    at = env.mail.layout.ffw + b * env.dims.ffw_dim + place
    env.mail.publish(at, hidden, env.tag(flush.layer), real)
