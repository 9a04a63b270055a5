"""The kernel that draws compiles for GPUs that are not here."""

import functools
import os
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import small_config
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffjax.cache import KVCache
from ffjax.loop import decode_block
from ffjax.model import Transformer
from ffjax.parts import taken_apart
from ffjax.sampling.draw import words_of
from ffjax.sampling.history import History
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Stages, rows_of
from ffjax.settings import program_settings
from pallas_kernels.compile import why_no_compiler
from pallas_kernels.draw import Before, draw_tokens, make_draw_plan, no_board
from pallas_kernels.gpu import Gpu
from pallas_kernels.logprobs import likeliest
from pallas_kernels.targets import target

pytestmark = [
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.skipif(
        os.environ.get("JAX_PLATFORMS") != "cpu",
        reason="XLA's CUDA plugin compiles without a GPU where JAX_PLATFORMS=cpu keeps it from one",
    ),
]


def there(name: str) -> tuple[Mesh, NamedSharding]:
    """Where arrays lie on a GPU that is not here."""
    config = target(name).config
    devices = topologies.get_topology_desc(
        "", "cuda", target_config=config, topology="1x1x1"
    ).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    return mesh, NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize("more", [False, True], ids=["filters", "all"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["h200", "a100", "l4"])
def test_it_compiles_to_one_launch(name, batch, more):
    """With penalties and a copy of the logits, too; nothing that is used up is copied."""
    vocab = 49152
    mesh, place = there(name)
    plan = make_draw_plan(batch, vocab, target(name).gpu, penalizes=more)
    assert plan is not None

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    given = {
        "logits": array(jnp.float32, batch, vocab),
        "likeliest": array(jnp.int32, batch),
        "keys": array(jnp.uint32, batch, 2),
        "temperature": array(jnp.float32, batch),
        "top_k": array(jnp.int32, batch),
        "nucleus": array(jnp.float32, batch, 2),
    }
    used_up = {"board": array(jnp.int32, *no_board(plan).shape)}
    if more:
        given |= {
            "penalties": array(jnp.float32, batch, 3),
            "prompt": array(bool, batch, vocab),
            "fed": array(jnp.int32, batch),
            "running": array(bool, batch),
        }
        used_up |= {
            "counts": array(jnp.int32, batch, vocab),
            "kept": array(jnp.int32, 8, batch, vocab),
        }

    def draw(used_up, given):
        every = used_up | given
        before = {name: every.pop(name) for name in Before._fields if name in every}
        return draw_tokens(plan, **every, before=Before(**before) if more else None)

    step = jax.jit(draw, donate_argnums=0)
    with jax.set_mesh(mesh):
        text = step.trace(used_up, given).lower().compile().as_text()
    assert text is not None and text.count("custom-call(") == 1 and "copy(" not in text


@pytest.mark.parametrize("name", ["h200", "a100", "l4"])
def test_log_probabilities_compile_to_two_launches(name):
    mesh, place = there(name)
    logits = jax.ShapeDtypeStruct((16, 49152), jnp.int32, sharding=place)
    token = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=place)
    with jax.set_mesh(mesh):
        lowered = jax.jit(functools.partial(likeliest, best=5)).trace(logits, token).lower()
        text = lowered.compile().as_text()
    assert text is not None and text.count("custom-call(") == 2 and "fusion(" not in text


def compiled_block(params: SamplingParams, vocab: int, steps: int = 8) -> str:
    """A block of steps of one sequence, for an H200: HLO."""
    config, gpu = small_config(vocab_size=vocab), target("h200").gpu
    mesh, place = there("h200")
    stages = Stages.of([params], (), gpu)

    def abstract():
        model, cache = Transformer(config, rngs=nnx.Rngs(0)), KVCache.create(config, 1, 256)
        return taken_apart(model)[1], cache, *[jnp.zeros((1,), jnp.int32)] * 2

    graphdef = taken_apart(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
    history = jax.eval_shape(lambda: History.empty(1, vocab)) if stages.remembers else None
    args = *jax.eval_shape(abstract), rows_of([params], [[]], words_of(0, 1), stages), history
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    block = functools.partial(
        decode_block, graphdef, steps=steps, stages=stages, implementation="pallas"
    )
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    with jax.set_mesh(mesh), mock.patch.object(Gpu, "of", lambda _: gpu), program_settings():
        step = jax.jit(block, donate_argnums=(1, 5), compiler_options=options)
        text = step.trace(*args).lower().compile().as_text()
    assert text is not None and "ffjax_decode_step" in text
    return text


def test_no_copy_of_logits_keeps_a_block_of_steps_from_being_a_graph():
    """Logits are kept for their log-probabilities; XLA takes asynchronous copies into no graph."""
    assert "-start" not in compiled_block(SamplingParams(logprobs=2), 4096)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_block_copies_no_cache(steps):
    text = compiled_block(SamplingParams(), 1000, steps)
    assert re.search(r"bf16\[2,1,1,256,64\]\S* parameter", text)
    assert not re.findall(r"bf16\[2,1,1,256,64\]\S* copy\(", text)


def test_xla_does_nothing_to_logits_that_the_kernel_draws_from():
    every = SamplingParams(temperature=1, top_k=5, frequency_penalty=0.1, logprobs=2)
    text = compiled_block(every, 4096)
    kernels = ("ffjax_draw", "ffjax_room", "ffjax_survey", "ffjax_likeliest")
    assert all(kernel in text for kernel in kernels)
    assert not re.findall(r"= .*\b4096\].* (?:fusion|copy)\(", text)
