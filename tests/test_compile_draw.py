"""The kernel that draws compiles for GPUs that are not here."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compile import why_no_compiler
from pallas_kernels.draw import draw_tokens, make_draw_plan, no_board
from pallas_kernels.targets import target

pytestmark = [
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.skipif(
        os.environ.get("JAX_PLATFORMS") != "cpu",
        reason="XLA's CUDA plugin compiles without a GPU where JAX_PLATFORMS=cpu keeps it from one",
    ),
]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["h200", "a100", "l4"])
def test_it_compiles_to_one_launch(name, batch):
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    vocab = 49152
    gpu = target(name)
    devices = topologies.get_topology_desc(
        "", "cuda", target_config=gpu.config, topology="1x1x1"
    ).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    there = NamedSharding(mesh, PartitionSpec())
    plan = make_draw_plan(batch, vocab, gpu.gpu)
    assert plan is not None

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=there)

    args = [
        array((batch, vocab), jnp.float32),
        array((batch,), jnp.int32),
        array((batch, 2), jnp.uint32),
        jax.ShapeDtypeStruct(no_board(plan).shape, jnp.int32, sharding=there),
        array((batch,), jnp.float32),
        array((batch,), jnp.int32),
        array((batch, 2), jnp.float32),
    ]
    step = jax.jit(lambda *args: draw_tokens(plan, *args), donate_argnums=3)
    with jax.set_mesh(mesh):
        text = step.trace(*args).lower().compile().as_text()
    assert text is not None and text.count("custom-call(") == 1
