"""One decode step both ways, on the same weights and the same cache: what differs?

Feeds a prompt through the reference model, then takes the next step once with the
reference ("xla") and once with the fused kernel ("pallas"), and compares logits and
greedy tokens. Without a GPU the kernel's body runs in Pallas's interpret mode.

    python examples/compare_step.py
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from flax import nnx

import ffjax
from ffjax.decode import fused_step, why_not_fused
from ffjax.tokenizer import ByteTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the two implementations on one step.")
    parser.add_argument("--prompt", default="import os\n\n\ndef main():\n    ")
    parser.add_argument("--capacity", type=int, default=256, help="positions of the cache")
    args = parser.parse_args()

    model = ffjax.load(ffjax.SHIPPED_MODEL)
    ids = ByteTokenizer().encode(args.prompt)
    if not 1 < len(ids) < args.capacity:
        parser.error(f"a prompt of 2 to {args.capacity - 1} bytes fits; this one has {len(ids)}")

    # All but the last token of the prompt fill the cache; the step feeds the last.
    cache = ffjax.KVCache.create(model.config, 1, args.capacity, model.dtype)
    prefill = nnx.jit(lambda model, tokens, cache: model(tokens, cache)[1])
    cache = prefill(model, jnp.array([ids[:-1]]), cache)
    token = jnp.array(ids[-1:])

    reason = why_not_fused(model, cache.batch, cache.capacity)
    if reason is None:
        fused = functools.partial(ffjax.decode_step, implementation="pallas")
        print(f"Fused kernel: one launch on {jax.devices()[0].device_kind}.")
    else:
        fused = functools.partial(fused_step, interpret=True)
        print(f"Fused kernel: its body, interpreted on the CPU, because: {reason}")
    reference = functools.partial(ffjax.decode_step, implementation="xla")

    # Neither call donates the cache: both read the very same buffers.
    by_kernel = nnx.jit(fused)(model, cache, token)
    by_reference = nnx.jit(reference)(model, cache, token)

    difference = jnp.abs(by_kernel.logits - by_reference.logits)
    scale = jnp.abs(by_reference.logits).max()
    position = int(cache.lengths[0])
    written = jnp.abs(
        by_kernel.cache.k[..., position, :].astype(jnp.float32)
        - by_reference.cache.k[..., position, :].astype(jnp.float32)
    )
    print(f"Position {position}, {model.config.name}, weights {model.dtype}.")
    print(f"Largest difference of a logit: {difference.max():.2e} (largest logit {scale:.2f})")
    print(f"Largest difference of a key the step wrote: {written.max():.2e}")
    print(f"Greedy token: kernel {by_kernel.token[0]}, reference {by_reference.token[0]}")


if __name__ == "__main__":
    main()
