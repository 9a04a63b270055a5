"""Compiles one decode step for a GPU that need not be there: a process of its own.

XLA reads its dump flags once, when its first backend starts, so `compile` starts this
module with them set. It reads `request.json` from the directory it is given, and leaves
`result.json` there; XLA's dumps lie beside them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.dims import Dims, Features, Grouping, WeightBits, WeightGroups
from pallas_kernels.launch import StepState
from pallas_kernels.stream.exchange_layout import exchange_words
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.planner import fitting, make_stream_plan, tuned
from pallas_kernels.targets import target

__all__ = ["MODULE", "compile_step", "main"]

# XLA calls the module, and the files it dumps, after the jitted function.
MODULE = "jit_decode_step"


def compile_step(plan: StreamPlan, config: str, hidden_layers: tuple[int, ...] = ()) -> Any:
    """Compiles the step as `ffjax.decode_step` under jit is, the cache donated.

    Args:
        plan: the step's plan.
        config: XLA's description of the GPU.
        hidden_layers: whose hidden states the step returns.

    Returns:
        JAX's compiled function.
    """
    d = plan.dims
    topology = topologies.get_topology_desc("", "cuda", target_config=config, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def spec(*shape: int, dtype=jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cache = spec(d.num_layers, d.batch, d.num_kv_heads, d.capacity, d.head_dim, dtype=jnp.bfloat16)
    state = StepState(cache, cache, spec(d.batch), spec(exchange_words(d)))
    weights = jax.tree.map(lambda x: spec(*x.shape, dtype=x.dtype), d.abstract_weights())

    def decode_step(weights, state, tokens):
        logits, token, state, hidden = stream_step(
            plan, weights, state, tokens, hidden_layers=hidden_layers
        )
        # The state first: a donated buffer becomes the first output of its shape.
        return state, logits, token, hidden

    with jax.set_mesh(mesh):
        step = jax.jit(decode_step, donate_argnames="state")
        return step.trace(weights, state, spec(d.columns)).lower().compile()


def main(directory: str) -> None:
    """Compiles what `request.json` asks for; writes `result.json`."""
    folder = pathlib.Path(directory)
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    gpu = target(request["gpu"])
    options, sizes = request["options"], request["dims"]
    features = sizes.pop("features")
    for name in ("local_layers", "other_rope"):
        features[name] = tuple(features[name])  # JSON has lists alone
    bits = WeightBits(**sizes.pop("weight_bits"))
    groups = {
        name: None if value is None else Grouping(**value)
        for name, value in sizes.pop("weight_groups").items()
    }
    dims = Dims(
        **sizes,
        features=Features(**features),
        weight_bits=bits,
        weight_groups=WeightGroups(**groups),
    )
    stages = {key: options.pop(key) for key in ("num_stages",) if key in options}
    tuning = tuned(dims, gpu.gpu) if request["tuned"] else None
    tuning = tuning or fitting(dims, gpu.gpu)
    plan = make_stream_plan(dims, gpu.gpu, dataclasses.replace(tuning, **options))
    plan = dataclasses.replace(plan, **stages)
    compiled = compile_step(plan, gpu.config, tuple(request["hidden_layers"]))
    result = {
        "programs": plan.programs,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
