"""Rows to look for the likeliest tokens in; the GPU's tests do so, too."""

import jax
import jax.numpy as jnp
import numpy as np

from ffjax.sampling.logprobs import likeliest_ids

__all__ = ["check_likeliest"]


def check_likeliest(vocab: int, best: int) -> None:
    """Compares ids with those of a stable sort: rows with ties, NaN, -inf, and of one value."""
    rng = np.random.default_rng(vocab + best)
    logits = rng.normal(size=(8, vocab)).astype(np.float32)
    logits[1] = 0.25
    logits[2] = -np.inf
    logits[3] = np.round(logits[3]) + 0.0  # no -0.0, which counts as less
    logits[4, rng.permutation(vocab)[: vocab - best // 2]] = -np.inf
    logits[5, rng.permutation(vocab)[: best // 2]] = np.nan
    logits[6, ::7] = logits[6].max()
    logits[7] = np.nan
    ids = jax.jit(likeliest_ids, static_argnums=1)(jnp.asarray(logits), best)
    # A NaN is more than all else.
    order = np.argsort(-np.where(np.isnan(logits), np.float32(np.inf), logits), kind="stable")
    np.testing.assert_array_equal(ids, order[:, :best])
