"""A block with a draft model, compiled for a GPU that is not here: its kernels, and its memory."""

import functools
import os
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import small_config
from flax import nnx

from ffjax.cache import KVCache
from ffjax.live.programs import _speculate
from ffjax.live.state import empty_state
from ffjax.model import Transformer
from ffjax.parts import taken_apart
from ffjax.sampling.rows import Rows, Stages
from ffjax.speculation.block import Bounds, Going, speculative_block
from ffjax.speculation.drafting import FIRST_TOKENS, ModelSource
from pallas_kernels.compile import why_no_compiler
from pallas_kernels.gpu import Gpu
from pallas_kernels.targets import target

pytestmark = [
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.skipif(
        os.environ.get("JAX_PLATFORMS") != "cpu",
        reason="XLA's CUDA plugin compiles without a GPU where JAX_PLATFORMS=cpu keeps it from one",
    ),
]


@pytest.mark.parametrize("lives", [False, True], ids=["generate", "live"])
def test_a_block_is_three_kernels_and_copies_no_cache(lives):
    """That of `generate`, and that of a batch whose sequences come and go."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    named, tokens, slots = target("h200"), 4, 16_384
    devices = topologies.get_topology_desc(
        "", "cuda", target_config=named.config, topology="1x1x1"
    ).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    there = NamedSharding(mesh, PartitionSpec())
    configs = small_config(num_layers=3), small_config(name="draft")

    def abstract() -> tuple[Any, ...]:
        models = [Transformer(config, rngs=nnx.Rngs(0)) for config in configs]
        if lives:
            draft = configs[1], models[1].dtype
            how = Stages(), tokens, draft
            state = empty_state(configs[0], 1, slots, models[0].dtype, *how)
            return models, state, jnp.zeros((1,), bool)
        cache, held = (
            KVCache.create(config, 1, slots, tokens=each)
            for config, each in zip(configs, (tokens, FIRST_TOKENS), strict=True)
        )
        number = jnp.zeros((1,), jnp.int32)
        known = jnp.zeros((1, slots), jnp.int32)
        going = Going(cache, known, number, None, held)
        return models, going, Bounds(number, number), Rows()

    models, *moving = nnx.eval_shape(abstract)
    (graphdef, state), (drawn, weights) = map(taken_apart, models)
    block = functools.partial(
        functools.partial(_speculate, drafts=True) if lives else speculative_block,
        graphdef,
        steps=8,
        stages=Stages(),
        implementation="pallas",
        source=ModelSource(graphdef=drawn, tokens=tokens, implementation="pallas"),
    )
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
        (state, *moving, weights),
    )
    with jax.set_mesh(mesh), mock.patch.object(Gpu, "of", lambda device: named.gpu):
        compiled = jax.jit(block, donate_argnums=1).trace(*args).lower().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    assert len(re.findall(r'custom_call_target="[^"]*triton', text)) == 3
    assert " conditional(" not in text
    held = moving[0].draft.cache if lives else moving[0].state
    arrays = (array for cache in (moving[0].cache, held) for array in (cache.k, cache.v))
    caches = sum(array.size * array.dtype.itemsize for array in arrays)
    assert memory.alias_size_in_bytes >= caches
    assert memory.temp_size_in_bytes < caches / 8
