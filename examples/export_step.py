"""A decode step as a file: `jax.export` writes it, and a program that knows JAX alone runs it.

    pip install '.[export]'
    python examples/export_step.py --out step.bin

The file holds the program, not the weights, for a batch, a capacity and a kind of device: the one
it is written on. Every argument and result is a dictionary, a tuple or an array.

A fused step is a kernel in the text of Triton, which JAX does not promise to read in a later
version, so that its export has to be asked for by name; and it is made for the number of
multiprocessors of its GPU. So: the same JAX, and the same kind of GPU.
"""

import argparse
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

import ffjax
from ffjax.decode import resolve_implementation

TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a decode step of the shipped model.")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=256, help="positions of the cache")
    args = parser.parse_args()
    if importlib.util.find_spec("flatbuffers") is None:
        parser.error("jax.export writes files with flatbuffers: pip install '.[export]'")

    model = ffjax.load(ffjax.SHIPPED_MODEL)
    cache = ffjax.KVCache.create(model.config, args.batch, args.capacity, model.dtype)
    exported = exported_step(model, cache)
    args.out.write_bytes(exported.serialize())
    name = resolve_implementation(model, cache)
    print(f"{args.out}: {args.out.stat().st_size} bytes, {name!r} for {exported.platforms[0]}")

    # What another program does: its cache is a dictionary of arrays, its weights too.
    step = jax.jit(export.deserialize(args.out.read_bytes()).call, donate_argnums=1)
    weights, store = weights_of(model), arrays_of(cache)
    token, tokenizer = jnp.full(args.batch, ord("d")), ffjax.ByteTokenizer()
    text = "d"
    for _ in range(40):
        store, _, token = step(weights, store, token.astype(jnp.int32))
        text += tokenizer.decode([int(token[0])])
    print(repr(text))


def weights_of(model: ffjax.Transformer) -> dict:
    """The model's own arrays, in dictionaries."""
    return nnx.to_pure_dict(nnx.state(model))


def arrays_of(cache: ffjax.KVCache) -> dict:
    """The cache's own arrays, in a dictionary."""
    return {name: array for name, array in vars(cache).items() if array is not None}


def exported_step(model: ffjax.Transformer, cache: ffjax.KVCache) -> export.Exported:
    """The step of weights, cache and tokens int32 `[B]`: the cache, logits and greedy tokens."""
    graph, state = nnx.split(model)

    def step(weights: dict, store: dict, tokens: jax.Array):
        own = jax.tree.map(lambda x: x, state)  # a copy of the dictionaries, not of arrays
        nnx.replace_by_pure_dict(own, weights)
        out = ffjax.decode_step(nnx.merge(graph, own), ffjax.KVCache(**store), tokens)
        return arrays_of(out.cache), out.logits, out.token

    arguments = weights_of(model), arrays_of(cache), jnp.zeros(cache.batch, jnp.int32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return export.export(jax.jit(step), disabled_checks=[TRITON])(*shapes)


if __name__ == "__main__":
    main()
