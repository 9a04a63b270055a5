"""The packed prefill compiles for GPUs that are not here, and takes the memory that it should."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffjax.cache import KVCache
from ffjax.config import ModelConfig, preset
from ffjax.formats import INT8, WeightFormats, int4
from ffjax.model import Transformer
from ffjax.parts import taken_apart
from ffjax.prefill import packed
from ffjax.prefill.packing import chunks_of
from ffjax.quantization import quantized_config
from ffjax.reproducible import SAME_IN_EVERY_PROCESS
from ffjax.sampling.rows import Rows, Stages
from pallas_kernels.compile import why_no_compiler
from pallas_kernels.targets import target

pytestmark = [
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.skipif(
        os.environ.get("JAX_PLATFORMS") != "cpu",
        reason="XLA's CUDA plugin compiles without a GPU where JAX_PLATFORMS=cpu keeps it from one",
    ),
]

FORMATS = {
    "bfloat16": None,
    "int8": WeightFormats.of_layers(INT8, INT8),
    "int4": WeightFormats.of_layers(int4(), INT8),
}


def memory_of(config: ModelConfig, gpu: str, size: int, capacity: int, dtype=jnp.bfloat16):
    """Compiles the program that feeds a chunk of so many tokens; XLA's account of its memory.

    What does not fit a GPU's shared memory does not compile.
    """
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    named = target(gpu)
    devices = topologies.get_topology_desc(
        "", "cuda", target_config=named.config, topology="1x1x1"
    ).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    there = NamedSharding(mesh, PartitionSpec())

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)

    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = taken_apart(model)
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, capacity, dtype))
    blocks = packed.blocks_of(config, dtype, named.gpu, size)
    [chunk] = chunks_of([np.zeros(size, np.int32)], capacity, lambda _: blocks.queries)
    ended = jax.ShapeDtypeStruct((1, config.model_dim), jnp.float32)
    choose = functools.partial(
        packed._feed_and_choose, graphdef, gpu=named.gpu, stages=Stages(), history=None
    )
    step = jax.jit(
        choose,
        donate_argnames=("cache", "last"),
        compiler_options=SAME_IN_EVERY_PROCESS,
    )
    arguments = map(abstract, (state, cache, ended, chunk, Rows()))
    with jax.set_mesh(mesh):
        memory = step.trace(*arguments).lower().compile().memory_analysis()
    assert memory is not None
    return memory


@pytest.mark.parametrize("weights", FORMATS)
def test_it_holds_one_layers_numbers_and_no_scores(weights):
    config = preset("llama3.1-8b")
    if (formats := FORMATS[weights]) is not None:
        config = quantized_config(config, formats)
    memory = memory_of(config, "h200", 2048, 8448)
    cache = 2 * 2 * 32 * 8 * 128 * 8448  # bytes of keys and values
    assert memory.alias_size_in_bytes >= cache  # it is updated where it is
    layer = 2 * sum(rows * inputs for rows, inputs in config.matrices.values())
    layer -= 2 * np.prod(config.matrices["head"]) if "head" in config.matrices else 0
    activations = 2048 * 4 * (2 * 4096 + 28_672)  # two streams, and a product of the widest
    scores = 4 * 32 * 2048 * 8448
    expected = activations + (layer if formats is not None else 0)
    assert memory.temp_size_in_bytes < expected < scores


# A GPU of each amount of shared memory, and heads as large as there are.
@pytest.mark.parametrize("gpu", ["a100", "l4"])
@pytest.mark.parametrize(
    ("head_dim", "weights", "size"),
    [(64, "int8", 32), (128, "int4", 64), (256, "int8", 128), (256, "bfloat16", 512)],
)
def test_it_fits_every_gpu(gpu, head_dim, weights, size):
    config = ModelConfig(
        vocab_size=256,
        num_layers=2,
        model_dim=2048,
        ffw_dim=8192,
        num_heads=8,
        num_kv_heads=2,
        head_dim=head_dim,
        attn_softcap=50.0,
        tied_embeddings=False,
    )
    if (formats := FORMATS[weights]) is not None:
        config = quantized_config(config, formats)
    memory_of(config, gpu, size, 1024)


@pytest.mark.parametrize("gpu", ["l4", "h200"])
def test_float32_fits_too(gpu):
    config = ModelConfig(
        vocab_size=256,
        num_layers=2,
        model_dim=256,
        ffw_dim=512,
        num_heads=2,
        num_kv_heads=1,
        head_dim=256,
    )
    memory_of(config, gpu, 128, 512, jnp.float32)
