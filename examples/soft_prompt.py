"""Embeddings in place of tokens: a prefix that no text has, then fused decode steps.

Eight vectors are trained until the shipped model, given them and a prompt, goes on with a text of
our choice (prompt tuning: Lester et al., arXiv 2104.08691). The reference model has the gradient,
and feeds the vectors into a cache; from there decode steps go on as from any other. A picture's
or a document's embeddings would go the same way.

    python examples/soft_prompt.py
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import ffjax

RATE, DECAYS = 0.05, (0.9, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a prefix of embeddings, and decodes.")
    parser.add_argument("--prompt", default="def greet(name):\n    ")
    parser.add_argument("--text", default='print("Hello, " + name)')
    parser.add_argument("--vectors", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="of training")
    args = parser.parse_args()
    if args.vectors < 1 or args.steps < 1 or not args.prompt or not args.text:
        parser.error("at least one vector and one step are needed, and a prompt and a text")

    model, tokenizer = ffjax.load(ffjax.SHIPPED_MODEL), ffjax.ByteTokenizer()
    prompt, text = (jnp.array(tokenizer.encode(part))[None] for part in (args.prompt, args.text))
    before = decoded(model, jnp.zeros((1, 0, model.config.model_dim)), prompt, text.size)
    prefix, loss = trained_prefix(model, prompt, text, args.vectors, args.steps)
    after = decoded(model, prefix, prompt, text.size)
    print(f"Without the prefix: {tokenizer.decode(before)!r}")
    print(f"With it, trained to a loss of {loss:.3f} a token: {tokenizer.decode(after)!r}")


def trained_prefix(
    model: ffjax.Transformer, prompt: jax.Array, text: jax.Array, vectors: int, steps: int
) -> tuple[jax.Array, float]:
    """Embeddings `[1, vectors, D]` after which the text follows the prompt, and its loss."""
    tokens = jnp.concatenate([prompt, text], axis=1)

    def loss_of(prefix: jax.Array, model: ffjax.Transformer) -> jax.Array:
        embeddings = jnp.concatenate([prefix, model.embedded(tokens)], axis=1)
        hidden: Any = model.last_hidden_state(embeddings)
        # The state at each position says what comes next.
        logits = model.logits(hidden[:, -text.size - 1 : -1])
        chances = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(chances, text[..., None], axis=-1).mean()

    @nnx.jit
    def step(model, prefix, mean, square, count):
        loss, slope = jax.value_and_grad(loss_of)(prefix, model)
        # Adam: Kingma and Ba, arXiv 1412.6980.
        mean = DECAYS[0] * mean + (1 - DECAYS[0]) * slope
        square = DECAYS[1] * square + (1 - DECAYS[1]) * slope**2
        unbiased = mean / (1 - DECAYS[0] ** count), square / (1 - DECAYS[1] ** count)
        return loss, prefix - RATE * unbiased[0] / (jnp.sqrt(unbiased[1]) + 1e-8), mean, square

    shape = 1, vectors, model.config.model_dim
    prefix = jax.random.normal(jax.random.key(0), shape) * model.embed[...].std()
    mean = square = jnp.zeros(shape)
    loss = jnp.inf
    for count in range(1, steps + 1):
        loss, prefix, mean, square = step(model, prefix, mean, square, float(count))
    return prefix, float(loss)


def decoded(
    model: ffjax.Transformer, prefix: jax.Array, prompt: jax.Array, count: int
) -> list[int]:
    """The greedy tokens after a prefix of embeddings `[1, P, D]` and a prompt int `[1, T]`."""

    @nnx.jit
    def fill(model, cache):
        embeddings = jnp.concatenate([prefix, model.embedded(prompt)], axis=1)
        hidden, cache = model.last_hidden_state(embeddings, cache, last_only=True)
        return model.logits(hidden).argmax(-1), cache

    step = nnx.jit(ffjax.decode_step, donate_argnames="cache")
    capacity = prefix.shape[1] + prompt.size + count
    token, cache = fill(model, ffjax.KVCache.create(model.config, 1, capacity, model.dtype))
    tokens = [int(token[0])]
    while len(tokens) < count:
        out = step(model, cache=cache, tokens=token)
        token, cache = out.token, out.cache
        tokens.append(int(token[0]))
    return tokens


if __name__ == "__main__":
    main()
