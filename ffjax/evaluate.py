"""How well a model predicts texts: bits per byte and perplexity, over whole files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffjax.model import Transformer
from ffjax.settings import own_settings
from ffjax.tokenizer import ByteTokenizer, Tokenizer, check_known

__all__ = [
    "METHOD",
    "METHOD_TOKENS",
    "Evaluation",
    "bits_per_byte",
    "default_context",
    "evaluate",
    "make_windows",
]

METHOD = (
    "each file is end-of-text, its bytes, end-of-text; every token after the first is "
    "predicted once, in windows of `context` tokens that advance by half a window, from the "
    "tokens before it in its window (at least half a window, or all there are)"
)

# Of a model whose tokens are not bytes. The first token of a text is predicted too, so that no
# byte goes uncounted: where nothing stands before a text, from end-of-text, as with bytes. BOS
# opens every window because such models attend to it wherever they are, and without it predict
# badly. A text's end is not scored: models for conversations are not trained to say it of files.
METHOD_TOKENS = (
    "each text is what its tokenizer puts before it (BOS; else end-of-text) and its own tokens, "
    "each of which is predicted once, in windows of `context` tokens that advance by half a "
    "window, from the tokens before it in its window; where there is BOS, every window begins "
    "with it; the bits are divided by the text's bytes in UTF-8"
)

# The longest window when nobody asks for one: attention's scores are float32 [B, N, T, S],
# and a model may be made for 131,072 positions.
_LONGEST_DEFAULT = 2048


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicted texts, by `METHOD` or `METHOD_TOKENS`.

    Attributes:
        bits: of all predicted tokens.
        tokens: how many were predicted: a text's bytes and its end, or its tokens.
        bytes: of the texts.
        context: tokens a window.
    """

    bits: float
    tokens: int
    bytes: int
    context: int

    @property
    def bits_per_byte(self) -> float:
        """The bits of all predicted tokens by the number of bytes."""
        return self.bits / self.bytes

    @property
    def perplexity(self) -> float:
        """Of a token: two to the power of the bits it took on average; 1 is certainty."""
        with np.errstate(over="ignore"):  # beyond 1024 bits a token it is infinity
            return float(np.exp2(self.bits / self.tokens))


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


def make_windows(
    text: bytes, context: int, tokenizer: Tokenizer | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a text into overlapping windows such that every token is scored once.

    Args:
        text: the bytes of one file.
        context: T, even.
        tokenizer: the model's; None: bytes.

    Returns:
        int32 `[n, T + 1]`, the windows, padded with end-of-text at the end of the last; and
        bool `[n, T]`, which of their predictions count.

    Raises:
        ValueError: the context is odd, or shorter than 2, or too short for the tokens that the
            tokenizer puts before a text; or the text is not UTF-8, and the tokens not bytes.
    """
    if context < 2 or context % 2:
        raise ValueError(f"Windows advance by half their length: even, got {context}.")
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    eot, half = tokenizer.eot_id, context // 2
    if isinstance(tokenizer, ByteTokenizer):  # a file need not be UTF-8 then
        before, own = [], [*text, eot]
    else:
        before, own = tokenizer.split(_as_text(text))
    if len(before) > half:
        raise ValueError(
            f"Half a window has room for the {len(before)} tokens that the tokenizer puts before "
            f"a text; of {context} tokens it has not. Choose a longer context."
        )
    tokens = np.array([*(before or [eot]), *own], np.int32)
    unscored = len(before) - 1 if before else 0  # predictions of the first tokens, by each other
    count = 1 + max(0, math.ceil((len(tokens) - 1 - context) / half))
    windows = np.full((count, context + 1), eot, np.int32)
    scored = np.zeros((count, context), bool)
    for i in range(count):
        start = i * half
        piece = tokens[start : start + context + 1]
        windows[i, : len(piece)] = piece
        windows[i, : len(before)] = before
        scored[i, (half if i else unscored) : len(piece) - 1] = True
    return windows, scored


def _as_text(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A model whose tokens are not bytes reads text in UTF-8; the byte at {error.start} "
            "is none. Convert the text, or measure a model of bytes."
        ) from None


def default_context(model: Transformer) -> int:
    """The window's length when none is asked for: the model's positions, at most 2048, even."""
    return min(model.config.max_context, _LONGEST_DEFAULT) // 2 * 2


@own_settings()
def evaluate(
    model: Transformer,
    texts: Sequence[bytes],
    *,
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
    batch: int = 16,
    progress: Callable[[Sequence[int]], Iterable[int]] | None = None,
) -> Evaluation:
    """How well a model predicts whole texts: by `METHOD` of bytes, by `METHOD_TOKENS` of others.

    A text longer than a window is not cut into pieces that know nothing of each other:
    windows overlap by half, and a token is scored only where its window shows at least
    half a window before it. Positions count from the window's start, so that they stay
    within those the model was made for.

    Args:
        model: the model, of any dtype.
        texts: the bytes of each file.
        tokenizer: the model's, as `ffjax.load_tokenizer` returns it. None: bytes.
        context: T, tokens a window, even. None: `default_context`.
        batch: B, windows at a time; it changes the time and the memory taken, the result
            by no more than float32's rounding.
        progress: wraps the sequence of the batches' first windows, as tqdm does.

    Returns:
        Bits, tokens and bytes, and what follows from them.

    Raises:
        ValueError: the vocabulary is not of bytes and there is no tokenizer, there is nothing to
            predict, a text is not UTF-8 and the tokens not bytes, or holds a token that the model
            does not know, or the context or the batch is out of range.
    """
    config = model.config
    if tokenizer is None and config.vocab_size != ByteTokenizer.vocab_size:
        raise ValueError(
            "Without a tokenizer, bits per byte are measured of a model that reads bytes, with a "
            f"vocabulary of {ByteTokenizer.vocab_size}; {config.name} has {config.vocab_size}. "
            "Give its tokenizer."
        )
    size = sum(len(text) for text in texts)
    if size == 0:
        raise ValueError("Bits per byte need at least one byte; the text is empty.")
    if batch < 1:
        raise ValueError(f"A batch holds at least one window, got batch={batch}.")
    context = default_context(model) if context is None else context
    if context > config.max_context:
        raise ValueError(
            f"A window needs {context} positions; {config.name} was made for "
            f"{config.max_context}. Choose a context of at most that."
        )
    pairs = [make_windows(text, context, tokenizer) for text in texts]
    for i, (cut, counted) in enumerate(pairs):
        # As they stand in the text, so that the first is named; then also what is not scored.
        in_order = np.concatenate([cut[:, 1:][counted], cut.ravel()])
        check_known("the text" if len(pairs) == 1 else f"text {i}", in_order, config)
    windows = np.concatenate([w for w, _ in pairs])
    scored = np.concatenate([s for _, s in pairs])
    tokens = int(scored.sum())
    if tokens == 0:
        raise ValueError(
            "Bits per byte need at least one token; the tokenizer makes none of the text."
        )
    # What every window only holds as padding need not be computed.
    used = int(np.flatnonzero(scored.any(axis=0)).max()) + 1
    windows, scored = windows[:, : used + 1], scored[:, :used]
    # Whole batches only, so that one program serves all; what fills up is not scored.
    batch = min(batch, len(windows))
    fill = -len(windows) % batch
    windows = np.pad(windows, ((0, fill), (0, 0)))
    scored = np.pad(scored, ((0, fill), (0, 0)))
    firsts: Sequence[int] = range(0, len(windows), batch)
    bits = 0.0
    for i in firsts if progress is None else progress(firsts):
        part = slice(i, i + batch)
        row_bits = _window_bits(model, jnp.asarray(windows[part]), jnp.asarray(scored[part]))
        bits += float(np.asarray(row_bits, np.float64).sum())
    return Evaluation(bits, tokens, size, context)


def bits_per_byte(
    model: Transformer, texts: Sequence[bytes], *, context: int = 1024, batch: int = 16
) -> float:
    """Bits per byte over whole texts, by `METHOD`; see `evaluate`.

    Args:
        model: a byte-level model.
        texts: the bytes of each file.
        context: T, tokens a window, even.
        batch: B, windows at a time.

    Returns:
        The bits of all predicted tokens, each text's end included, by the number of bytes.

    Raises:
        ValueError: as `evaluate`.
    """
    return evaluate(model, texts, context=context, batch=batch).bits_per_byte
