"""A step's first layers alone: what it has handed over in any layer can then be read.

A launch cannot be stopped and looked at: its programs wait for each other. But every buffer is
written once a layer, so a step that ends after a layer leaves what all segments of that layer have
handed over. It runs the same code on the same arrays.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.launch import StepState
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["first_layers", "fresh"]


def first_layers(plan: StreamPlan, layers: int) -> StreamPlan:
    """The plan of a step that ends after its first `layers` layers; the head follows them.

    Nothing else of the plan depends on how many there are. It takes the arrays of the whole model.

    Raises:
        ValueError: there are not so many layers, or none are asked for.
    """
    d = plan.dims
    if not 1 <= layers <= d.num_layers:
        raise ValueError(
            f"A step is cut after one of its layers, 1 to {d.num_layers} of them; got {layers}."
        )
    features = dataclasses.replace(
        d.features,
        local_layers=d.features.local_layers[:layers],
        other_rope=d.features.other_rope[:layers],
    )
    cut = dataclasses.replace(d, num_layers=layers, features=features)
    return dataclasses.replace(plan, dims=cut)


def fresh(state: StepState) -> StepState:
    """The same cache with an exchange that nobody has used.

    Tags count layers: words that a step of another number of layers has left could pass for new.
    """
    return state._replace(counters=jnp.zeros_like(state.counters))
