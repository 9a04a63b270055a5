"""Decode loops of one's own on the device: `lax.while_loop` with a stop, `lax.scan` with a sampler.

    python examples/own_loop.py

A step is a function of arrays: it goes into any `jax.jit`. The whole loop is one program here, so
that the host is asked for nothing between two tokens. `ffjax.generate` is such a loop, with more.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import ffjax

CAPACITY, NEWLINE = 256, ord("\n")


def main() -> None:
    model, tokenizer = ffjax.load(ffjax.SHIPPED_MODEL), ffjax.ByteTokenizer()
    prompt = jnp.array(tokenizer.encode("import os\nfrom "))

    # Without its arrays a model is what jit may hash; the arrays are traced.
    graph, weights = nnx.split(model)
    line, count = until(graph, weights, prompt, NEWLINE)
    print(f"while_loop, to the end of the line: {tokenizer.decode(line[:count].tolist())!r}")
    for seed in range(3):
        drawn = sampled(graph, weights, prompt, jax.random.key(seed), steps=24)
        print(f"scan, 24 tokens drawn from the best 3: {tokenizer.decode(drawn.tolist())!r}")


def prefilled(model: ffjax.Transformer, prompt: jax.Array) -> tuple[ffjax.KVCache, jax.Array]:
    """A cache that holds the prompt int `[T]`, and the logits `[1, V]` of what follows."""
    cache = ffjax.KVCache.create(model.config, 1, CAPACITY, model.dtype)
    logits, cache = model(prompt[None], cache, last_only=True)
    return cache, logits


@functools.partial(jax.jit, static_argnums=0)
def until(graph, weights, prompt, stop):
    """Greedy tokens int32 `[CAPACITY]` up to a stop token or a full cache, and their number."""
    model = nnx.merge(graph, weights)
    cache, logits = prefilled(model, prompt)
    token = logits.argmax(-1).astype(jnp.int32)

    def goes_on(carry):
        cache, token, _, _ = carry
        return (token[0] != stop) & (cache.lengths[0] < CAPACITY)

    def step(carry):
        cache, token, made, count = carry
        out = ffjax.decode_step(model, cache, token)
        return out.cache, out.token, made.at[count].set(token[0]), count + 1

    start = cache, token, jnp.zeros(CAPACITY, jnp.int32), jnp.int32(0)
    _, _, made, count = lax.while_loop(goes_on, step, start)
    return made, count


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps")
def sampled(graph, weights, prompt, key, *, steps):
    """`steps` tokens int32, each drawn from the three likeliest."""
    model = nnx.merge(graph, weights)
    cache, logits = prefilled(model, prompt)

    def step(carry, key):
        cache, logits = carry
        best, ids = lax.top_k(logits[0], 3)
        token = ids[jax.random.categorical(key, best)][None]
        out = ffjax.decode_step(model, cache, token)
        return (out.cache, out.logits), token[0]

    _, made = lax.scan(step, (cache, logits), jax.random.split(key, steps))
    return made


if __name__ == "__main__":
    main()
