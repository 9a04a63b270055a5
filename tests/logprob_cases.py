"""Rows to look for the likeliest tokens in; the GPU's tests do so, too."""

import jax
import jax.numpy as jnp
import numpy as np

from ffjax.sampling.logprobs import likeliest_ids, log_probs
from pallas_kernels.gpu import Gpu
from pallas_kernels.logprobs import ordered

__all__ = ["check_likeliest", "check_log_probs"]


def _rows(vocab: int, best: int) -> np.ndarray:
    """Rows with ties, NaN, infinities, and of one value."""
    rng = np.random.default_rng(vocab + best)
    logits = rng.normal(size=(8, vocab)).astype(np.float32)
    logits[1] = 0.25
    logits[2] = -np.inf
    logits[3] = np.round(logits[3]) + 0.0  # no -0.0, which counts as less
    logits[4, rng.permutation(vocab)[: vocab - best // 2]] = -np.inf
    logits[5, rng.permutation(vocab)[: best // 2]] = np.nan
    logits[6, ::7] = logits[6].max()
    logits[7] = np.nan
    return logits


def _sorted(logits: np.ndarray, best: int) -> np.ndarray:
    """The ids by a stable sort; a NaN is more than all else."""
    falling = -np.where(np.isnan(logits), np.float32(np.inf), logits)
    return np.argsort(falling, kind="stable")[:, :best]


def check_likeliest(vocab: int, best: int) -> None:
    """Compares XLA's ids with those of a stable sort."""
    logits = _rows(vocab, best)
    ids = jax.jit(likeliest_ids, static_argnums=1)(jnp.asarray(logits), best)
    np.testing.assert_array_equal(ids, _sorted(logits, best))


def check_log_probs(vocab: int, best: int, gpu: Gpu) -> None:
    """Compares what the kernel tells with float64, and the same of integers, and row by row."""
    logits = _rows(vocab, best)
    tokens = np.random.default_rng(0).integers(0, vocab, 8).astype(np.int32)
    tokens[0] = -1  # of whom nobody asks
    run = jax.jit(log_probs, static_argnums=(2, 3))
    out = run(jnp.asarray(logits), tokens, best, gpu)
    np.testing.assert_array_equal(out.top_ids, _sorted(logits, best))
    with np.errstate(invalid="ignore", divide="ignore"):
        wide = logits.astype(np.float64)
        most = np.where(np.isfinite(wide.max(-1)), wide.max(-1), 0)[:, None]
        want = wide - most - np.log(np.exp(wide - most).sum(-1, keepdims=True))
    rows = np.arange(8)
    asked = np.concatenate([np.maximum(tokens, 0)[:, None], out.top_ids], axis=1)
    got = np.concatenate([out.chosen[:, None], out.top], axis=1)
    np.testing.assert_allclose(got, want[rows[:, None], asked], rtol=1e-6, atol=1e-5)
    for other in (
        run(jax.jit(ordered)(jnp.asarray(logits)), tokens, best, gpu),
        jax.tree.map(
            lambda *x: np.concatenate(x),
            *(run(jnp.asarray(logits[b : b + 1]), tokens[b : b + 1], best, gpu) for b in rows),
        ),
    ):
        for one, same in zip(out, other, strict=True):
            np.testing.assert_array_equal(one, same)
