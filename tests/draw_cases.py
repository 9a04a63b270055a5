"""Draws to compare the kernel with XLA by; the GPU's tests run them too."""

import jax
import jax.numpy as jnp
import numpy as np

from ffjax.sampling.draw import sample, sequence_keys, step_keys, words_of
from ffjax.sampling.filters import filtered
from ffjax.settings import own_settings
from pallas_kernels.draw import draw_tokens, make_draw_plan, no_board
from pallas_kernels.gpu import INTERPRETER, Gpu

__all__ = ["DRAWS", "check"]

EVERY = 2**31 - 1
# What each row takes one of: temperature, top_k, top_p and min_p.
DRAWS = {
    "temperature": ((0.0, 0.3, 1.0, 7.0), (EVERY,), (1.0,), (0.0,)),
    "top-k": ((0.7, 1.0, 1.5), (1, 2, 20, 50, 400, EVERY), (1.0,), (0.0,)),
    "top-p": ((0.2, 1.0, 3.0), (EVERY,), (1.0, 0.95, 0.5, 0.1, 1e-6), (0.0,)),
    "min-p": ((0.5, 1.0), (EVERY,), (1.0,), (0.0, 0.05, 0.5, 1.0)),
    "all": ((0.0, 0.6, 1.0, 2.0), (1, 5, 50, EVERY), (0.9, 0.4, 1.0), (0.0, 0.02)),
}


def check(draws: str, batch: int, vocab: int, gpu: Gpu, *, seeds: int) -> None:
    """Compares tokens, of rows of every kind: drawn, all equal, some equal, some forbidden."""
    temperatures, *rest = DRAWS[draws]
    plan = make_draw_plan(batch, vocab, gpu)
    assert plan is not None
    interpret = gpu == INTERPRETER
    kernel = jax.jit(lambda *args: draw_tokens(plan, *args, interpret=interpret))
    reference = jax.jit(_reference)
    board = no_board(plan)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(batch, vocab)).astype(np.float32) * rng.choice([0.5, 2.0, 6.0])
        if seed % 4 == 1:
            logits[:, :: 3 + seed] = logits.max()
        if seed % 4 == 2:
            logits[0] = 0.5
        if seed % 4 == 3:
            logits[:, rng.permutation(vocab)[: vocab // 2]] = -np.inf
        logits = jnp.asarray(logits)
        temperature = jnp.asarray(rng.choice(temperatures, batch), jnp.float32)
        top_k = jnp.asarray(rng.choice(rest[0], batch), jnp.int32)
        nucleus = np.stack([rng.choice(each, batch) for each in rest[1:]], axis=1)
        filters = top_k, jnp.asarray(nucleus, jnp.float32)
        parameters = temperature, *filters
        with own_settings():
            keys = step_keys(sequence_keys(words_of(seed, batch)), 3)
            likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            words = jax.random.key_data(keys)
            got, board = kernel(logits, likeliest, words, board, temperature, *filters)
            want = reference(logits, keys, temperature, *filters)
        assert got.tolist() == want.tolist(), [
            (seed, b, [int(x[b]), float(logits[b, x[b]])], *(y[b].tolist() for y in parameters))
            for b in range(batch)
            for x in (got, want)
            if got[b] != want[b]
        ]


def _reference(logits, keys, temperature, *filters):
    return sample(filtered(logits, temperature, *filters), keys, temperature)
