"""How well a byte-level model predicts texts: bits per byte, over whole files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffjax.model import Transformer
from ffjax.tokenizer import ByteTokenizer

METHOD = (
    "each file is end-of-text, its bytes, end-of-text; every token after the first is "
    "predicted once, in windows of `context` tokens that advance by half a window, from the "
    "tokens before it in its window (at least half a window, or all there are)"
)


@nnx.jit
def _window_bits(model: Transformer, windows: jax.Array, scored: jax.Array) -> jax.Array:
    """Bits of the scored tokens of each window.

    Args:
        model: the model.
        windows: int32 `[B, T + 1]`; token t + 1 is predicted from those up to t.
        scored: bool `[B, T]`, which predictions count.

    Returns:
        float32 `[B]`.
    """
    logits = model(windows[:, :-1])
    assert isinstance(logits, jax.Array)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, windows[:, 1:, None], axis=2)[..., 0]
    return -jnp.where(scored, picked, 0).sum(axis=1) / math.log(2)


def make_windows(text: bytes, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a text into overlapping windows such that every token is scored once.

    Args:
        text: the bytes of one file.
        context: T, even.

    Returns:
        int32 `[n, T + 1]`, the windows, padded with end-of-text at the end of the last; and
        bool `[n, T]`, which of their predictions count.
    """
    if context < 2 or context % 2:
        raise ValueError(f"Windows advance by half their length: even, got {context}.")
    eot, half = ByteTokenizer.eot_id, context // 2
    tokens = np.array([eot, *text, eot], np.int32)
    predictions = len(tokens) - 1
    count = 1 + max(0, math.ceil((predictions - context) / half))
    windows = np.full((count, context + 1), eot, np.int32)
    scored = np.zeros((count, context), bool)
    for i in range(count):
        start = i * half
        piece = tokens[start : start + context + 1]
        windows[i, : len(piece)] = piece
        scored[i, (half if i else 0) : len(piece) - 1] = True
    return windows, scored


def bits_per_byte(
    model: Transformer, texts: Sequence[bytes], *, context: int = 1024, batch: int = 16
) -> float:
    """Bits per byte over whole texts, by `METHOD`.

    Args:
        model: a byte-level model.
        texts: the bytes of each file.
        context: tokens a window.
        batch: windows at a time; it changes the time taken, not what is computed.

    Returns:
        The bits of all predicted tokens, each text's end included, by the number of bytes.
    """
    pairs = [make_windows(text, context) for text in texts]
    windows = np.concatenate([w for w, _ in pairs])
    scored = np.concatenate([s for _, s in pairs])
    # Whole batches only, so that one program serves all; what fills up is not scored.
    fill = -len(windows) % batch
    windows = np.pad(windows, ((0, fill), (0, 0)))
    scored = np.pad(scored, ((0, fill), (0, 0)))
    bits = 0.0
    for i in range(0, len(windows), batch):
        part = slice(i, i + batch)
        row_bits = _window_bits(model, jnp.asarray(windows[part]), jnp.asarray(scored[part]))
        bits += float(np.asarray(row_bits, np.float64).sum())
    return bits / sum(len(text) for text in texts)
