"""The fidelity gate: is the fused kernel at least as close to float32 as the bfloat16 model is?

Three computations of the same bfloat16 weights read the same prompts, teacher forced, a decode
step a token, each with a cache of its own:

- the reference: the weights in float32, those of a quantized model multiplied out, a float32
  cache, products at the highest precision;
- the baseline: the reference model in bfloat16; of a quantized model, that very model;
- the candidate: the fused kernel, or whatever else is given.

Two metrics say how far the baseline and the candidate each lie from the reference, at every
position: the KL divergence of the next token's distribution from the reference's, and the
absolute difference of the actual next token's negative log-likelihood (NLL). Both are in nats,
computed from the logits in float64, and averaged over the positions of a prompt to one number.

The gate, for each metric: of candidate minus baseline, prompt by prompt, neither the mean nor
the upper 95% bound of that mean is above zero. The bound is the 95th percentile of the means of
10,000 bootstrap resamples of the prompts, one-sided. Resampling the differences keeps each
prompt's pair together: that prompts differ in difficulty does not widen the bound. What is not
finite does not pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import (
    DecodeOutput,
    Implementation,
    backend_of,
    choose_kernel,
    fused_step,
    reference_step,
    resolve_implementation_config,
)
from ffjax.model import Transformer
from ffjax.quantization import dequantize
from ffjax.seeds import MAX_SEED, key_of
from ffjax.stdlib_text import Source, read_sources
from ffjax.tokenizer import ByteTokenizer, Tokenizer
from pallas_kernels.support import MAX_BATCH

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "Candidate",
    "Comparison",
    "Estimate",
    "Fidelity",
    "Step",
    "choose_candidate",
    "compare",
    "held_out_prompts",
    "kl_divergence",
    "measure",
    "negative_log_likelihood",
    "random_model",
    "random_prompts",
    "upcast",
    "upper_bound",
]

LEVEL = 0.95
RESAMPLES = 10_000
# Of the resamples alone: the same prompts always get the same bound.
_BOOTSTRAP_SEED = 0
# An interpreted step of the shipped model, of 3 million weights, takes about a second.
_MOST_INTERPRETED_WEIGHTS = 10_000_000

Step = Callable[[Transformer, KVCache, jax.Array], DecodeOutput]
"""A decode step: model, cache and tokens int `[B]` to the next cache and logits."""


# The metrics


def _log_probs(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of logits `[..., V]`, float64: what is not finite spreads and stays."""
    logits = np.asarray(logits, np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, as it should be
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities `[..., V]`."""
    with np.errstate(invalid="ignore"):
        kl = (np.exp(p) * (p - q)).sum(axis=-1)
    # A logit of minus infinity is a defect, also where p has no weight.
    finite = np.isfinite(p).all(axis=-1) & np.isfinite(q).all(axis=-1)
    return np.where(finite, kl, np.nan)


def _nll(log_probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) of the distributions that logits stand for.

    In float64: it is of second order in the difference of the logits, and float32 would
    round away differences as small as those of interest.

    Args:
        reference: float `[..., V]`, logits.
        other: float `[..., V]`, logits.

    Returns:
        float64 `[...]`, nats; NaN where a row holds what is not finite.
    """
    return _kl(_log_probs(reference), _log_probs(other))


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of the target under the distribution that the logits stand for.

    Args:
        logits: float `[..., V]`.
        targets: int `[...]`.

    Returns:
        float64 `[...]`, nats.
    """
    return _nll(_log_probs(logits), np.asarray(targets))


# The bootstrap


def upper_bound(values: np.ndarray) -> float:
    """The one-sided upper 95% bound of the mean: a percentile bootstrap with a fixed seed.

    Args:
        values: float64 `[n]`, one a prompt.

    Returns:
        The 95th percentile of the means of 10,000 resamples; NaN if a value is not finite.

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(
            f"A bootstrap over prompts needs at least 2 of them, got {len(values)}. The gate is "
            "meant for 16 or more."
        )
    drawn = np.random.default_rng(_BOOTSTRAP_SEED).integers(
        0, len(values), (RESAMPLES, len(values))
    )
    if not np.isfinite(values).all():
        return math.nan
    return float(np.quantile(np.asarray(values, np.float64)[drawn].mean(axis=1), LEVEL))


class Estimate(NamedTuple):
    """A mean over prompts and its upper 95% bound, in nats."""

    mean: float
    upper: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """The mean of values `[n]`, one a prompt, and its bound."""
        with np.errstate(invalid="ignore"):
            return cls(float(np.mean(values)), upper_bound(values))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One metric of the candidate beside the baseline's, over the same prompts.

    Attributes:
        candidate: of the candidate's numbers.
        baseline: of the baseline's.
        difference: of candidate minus baseline, prompt by prompt: what the gate is about.
    """

    candidate: Estimate
    baseline: Estimate
    difference: Estimate

    @property
    def passed(self) -> bool:
        """Whether the difference's mean and bound are not above zero, and all is finite."""
        figures = (*self.candidate, *self.baseline, *self.difference)
        finite = all(math.isfinite(figure) for figure in figures)
        return finite and self.difference.mean <= 0 and self.difference.upper <= 0


def compare(candidate: np.ndarray, baseline: np.ndarray) -> Comparison:
    """Compares a metric's numbers, paired by prompt.

    Args:
        candidate: float64 `[n]`, one a prompt.
        baseline: float64 `[n]`, of the same prompts in the same order.

    Raises:
        ValueError: the shapes differ, or there are fewer than two prompts.
    """
    if candidate.shape != baseline.shape or candidate.ndim != 1:
        raise ValueError(
            "A paired comparison takes one number a prompt from each, shape [n], got "
            f"{candidate.shape} and {baseline.shape}."
        )
    with np.errstate(invalid="ignore"):
        difference = candidate - baseline
    return Comparison(*(Estimate.of(values) for values in (candidate, baseline, difference)))


# The measurement


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How far candidate and baseline lie from the float32 reference.

    Attributes:
        kl: KL(reference || it), nats a position.
        nll: |NLL of it - NLL of the reference| of the next token, nats a position.
        reference_nll: the reference's mean NLL, nats a token: what the text is like.
    """

    kl: Comparison
    nll: Comparison
    reference_nll: float

    @property
    def passed(self) -> bool:
        """Whether the gate passes in both metrics."""
        return self.kl.passed and self.nll.passed


def upcast(model: Transformer) -> Transformer:
    """A copy of the model with the same weights in float32; nothing of it is quantized."""
    return dequantize(model, jnp.float32)


@functools.partial(jax.jit, static_argnames=("step", "graph"), donate_argnames="cache")
def _feed(
    step: Step, graph: Any, state: Any, cache: KVCache, tokens: jax.Array
) -> tuple[KVCache, jax.Array]:
    out = step(nnx.merge(graph, state), cache, tokens)
    return out.cache, out.logits


class _Reader:
    """Feeds tokens to a model, step by step, with a cache of its own."""

    def __init__(self, model: Transformer, step: Step):
        self._config, self._dtype, self._step = model.config, model.dtype, step
        self._graph, self._state = nnx.split(model)

    def start(self, batch: int, capacity: int) -> None:
        """Begins new prompts, with an empty cache."""
        self._cache = KVCache.create(self._config, batch, capacity, self._dtype)

    def feed(self, tokens: jax.Array) -> jax.Array:
        """Logits after int `[B]` more tokens: float32 `[B, V]`, not waited for."""
        self._cache, logits = _feed(self._step, self._graph, self._state, self._cache, tokens)
        return logits


def _check_prompts(config: ModelConfig, prompts: np.ndarray, batch: int) -> None:
    if prompts.ndim != 2 or prompts.shape[1] < 2 or not np.issubdtype(prompts.dtype, np.integer):
        raise ValueError(
            "Prompts come as integers [n, T + 1], T at least 1: the last token is only "
            f"predicted. Got {prompts.dtype} of shape {list(prompts.shape)}."
        )
    if prompts.shape[0] < 2:
        raise ValueError(f"The gate compares over at least 2 prompts, got {prompts.shape[0]}.")
    if prompts.shape[1] - 1 > config.max_context:
        raise ValueError(
            f"A prompt of {prompts.shape[1] - 1} steps needs as many positions; {config.name} "
            f"was made for {config.max_context}. Take fewer tokens."
        )
    if prompts.min() < 0 or prompts.max() >= config.vocab_size:
        raise ValueError(
            f"Token ids of {config.name} are 0 to {config.vocab_size - 1}; the prompts have "
            f"{prompts.min()} to {prompts.max()}."
        )
    if batch < 1:
        raise ValueError(f"A batch holds at least one prompt, got batch={batch}.")


def measure(
    model: Transformer,
    prompts: np.ndarray,
    candidate: Step,
    *,
    batch: int = MAX_BATCH,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
) -> Fidelity:
    """Runs the candidate, the bfloat16 baseline and the float32 reference over prompts.

    A float32 copy of the weights is made beside them, and lives as long as the call.

    Args:
        model: the model, its weights bfloat16, or quantized.
        prompts: int `[n, T + 1]`: T tokens are fed, and each is followed by the next. The
            caches have T slots.
        candidate: its decode step, with the model's own weights and a bfloat16 cache.
        batch: B, prompts that run side by side. The last batch may be smaller.
        progress: wraps the sequence of steps, as tqdm does.

    Returns:
        Both metrics, over the prompts.

    Raises:
        TypeError: the weights are not bfloat16.
        ValueError: the prompts are of another shape, fewer than two, too long for the
            model, or outside its vocabulary; or the batch is not positive.
        NotImplementedError: the candidate cannot run here.
    """
    prompts = np.asarray(prompts)
    _check_prompts(model.config, prompts, batch)
    if model.dtype != jnp.bfloat16:
        raise TypeError(
            "The gate compares computations of bfloat16 weights; these are "
            f"{jnp.dtype(model.dtype).name}. Load the model with dtype=jnp.bfloat16."
        )
    count, steps = prompts.shape[0], prompts.shape[1] - 1
    reference = _Reader(upcast(model), reference_step)
    others = _Reader(model, candidate), _Reader(model, reference_step)
    # Sums over positions, of each prompt: [candidate or baseline, n].
    kl, nll = np.zeros((2, count)), np.zeros((2, count))
    reference_nll = np.zeros(count)
    todo = [(first, t) for first in range(0, count, batch) for t in range(steps)]
    for first, t in todo if progress is None else progress(todo):
        rows = slice(first, first + batch)
        some = prompts[rows]
        if t == 0:
            for reader in (reference, *others):
                reader.start(len(some), steps)
        fed = jnp.asarray(some[:, t], jnp.int32)
        # All have their orders before the first result is waited for.
        on_device = [reader.feed(fed) for reader in (reference, *others)]
        want, *got = (_log_probs(np.asarray(logits)) for logits in on_device)
        targets = some[:, t + 1]
        reference_nll[rows] += _nll(want, targets)
        for which, log_probs in enumerate(got):
            kl[which, rows] += _kl(want, log_probs)
            with np.errstate(invalid="ignore"):
                nll[which, rows] += np.abs(_nll(log_probs, targets) - _nll(want, targets))
    return Fidelity(
        kl=compare(*kl / steps),
        nll=compare(*nll / steps),
        reference_nll=float(reference_nll.mean() / steps),
    )


# What is measured


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Whose logits are compared.

    Attributes:
        step: its decode step.
        implementation: "pallas", the fused kernel; "xla", the baseline once more.
        why_interpreted: None, or why the kernel's body is interpreted, a sentence.
    """

    step: Step
    implementation: Implementation
    why_interpreted: str | None = None


def choose_candidate(
    config: ModelConfig, batch: int, capacity: int, implementation: Implementation | None = None
) -> Candidate:
    """The candidate that can run a model of this configuration here, in bfloat16.

    Nothing is allocated: what cannot run is refused before the weights are made.

    Args:
        config: the model's.
        batch: B.
        capacity: S, slots of the cache.
        implementation: a name, that one or an error; None: the fused kernel that knows such
            a model, which for a small one is interpreted where it cannot be launched.

    Raises:
        ValueError: the implementation's name is unknown.
        NotImplementedError: the named implementation cannot run here; or there is no
            name, and the model is too large to be interpreted.
    """
    asked = config, jnp.bfloat16, batch, capacity
    kernel, reason = choose_kernel(*asked)
    if implementation is None and kernel is None:
        if config.num_params > _MOST_INTERPRETED_WEIGHTS:
            raise NotImplementedError(
                f"{reason} Nor is the kernel's body interpreted for the {config.num_params} "
                f"weights of {config.name}: that takes too long for more than "
                f"{_MOST_INTERPRETED_WEIGHTS}."
            )
        return Candidate(functools.partial(fused_step, interpret=True), "pallas", reason)
    name = resolve_implementation_config(*asked, implementation or kernel)
    if name == "xla":
        return Candidate(reference_step, name)
    backend = backend_of(name)
    step = fused_step if backend is None else functools.partial(fused_step, backend=backend)
    return Candidate(step, name)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A bfloat16 model of random weights, made on the device by one program.

    As `Transformer` makes them, but every norm's weights lie up to a half around where they
    start: of all ones, a kernel that mistakes one norm for another would go unnoticed.
    """

    return _random_model(config, seed)


@functools.partial(nnx.jit, static_argnames=("config", "seed"))
def _random_model(config: ModelConfig, seed: int) -> Transformer:
    model = Transformer(config, rngs=nnx.Rngs(key_of(seed)))
    key = key_of((seed + 1) & MAX_SEED)

    def shaken(path: tuple[Any, ...], weight: jax.Array) -> jax.Array:
        if "norm" not in str(path[-1]):
            return weight
        number = zlib.crc32(".".join(map(str, path)).encode())
        noise = jax.random.uniform(
            jax.random.fold_in(key, number), weight.shape, minval=-0.5, maxval=0.5
        )
        return (weight + noise).astype(weight.dtype)

    nnx.update(model, nnx.map_state(shaken, nnx.state(model, nnx.Param)))
    return model


def _check_size(count: int, tokens: int) -> None:
    if count < 1 or tokens < 1:
        raise ValueError(
            f"Prompts and their tokens number at least 1, got {count} prompts of {tokens} tokens."
        )


def random_prompts(config: ModelConfig, count: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Token ids drawn from the whole vocabulary.

    Args:
        config: the model's.
        count: n, how many prompts.
        tokens: T, tokens to feed; one more is predicted.
        seed: of the draws.

    Returns:
        int64 `[count, tokens + 1]`.

    Raises:
        ValueError: either number is not positive.
    """
    _check_size(count, tokens)
    return np.random.default_rng(seed).integers(0, config.vocab_size, (count, tokens + 1))


def held_out_prompts(
    count: int,
    tokens: int,
    seed: int = 0,
    *,
    tokenizer: Tokenizer | None = None,
    held_out: Sequence[Source] | None = None,
) -> np.ndarray:
    """Pieces of the files that the shipped model was not trained on, in a model's own tokens.

    Each file is cut into pieces of `tokens + 1` tokens, the rest left over; where a tokenizer
    puts tokens before a text (BOS), they are the first of every piece. Pieces are drawn
    without repetition, a file's second one only after every file has given its first.

    Args:
        count: n, how many.
        tokens: T, tokens to feed; one more is predicted.
        seed: of the draws.
        tokenizer: the model's; None: bytes.
        held_out: the files; None: those of the running Python's standard library, of
            another version perhaps than the one trained on: none of these names was.

    Returns:
        int64 `[count, tokens + 1]`.

    Raises:
        ValueError: the files have not as many pieces of that length, or either number
            is not positive.
    """
    _check_size(count, tokens)
    held_out = read_sources()[1] if held_out is None else held_out
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    rng, size = np.random.default_rng(seed), tokens + 1
    rounds: list[tuple[int, int]] = []  # each piece's turn within its file, and its number
    pieces: list[list[int]] = []
    for i in rng.permutation(len(held_out)):
        before, own = _split(held_out[i].text, tokenizer)
        room = max(size - len(before), 1)
        cuts = [(before + own[at : at + room])[:size] for at in range(0, len(own) - room + 1, room)]
        for turn, cut in enumerate(rng.permutation(len(cuts))):
            rounds.append((turn, len(pieces)))
            pieces.append(cuts[cut])
    if len(pieces) < count:
        unit = "bytes" if isinstance(tokenizer, ByteTokenizer) else "tokens"
        raise ValueError(
            f"The held-out files of this Python's standard library have {len(pieces)} pieces of "
            f"{size} {unit}; {count} were asked for. Take fewer prompts, or fewer tokens."
        )
    chosen = [pieces[i] for _, i in sorted(rounds)[:count]]
    return np.array(chosen, np.int64)


def _split(text: bytes, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The token ids before a file's text, and its own."""
    if isinstance(tokenizer, ByteTokenizer):
        return [], list(text)
    # A few old files of the library are not UTF-8; as prompts they need not be whole.
    return tokenizer.split(text.decode("utf-8", "replace"))
