"""What the tests of speculation share: small models, prompts, and the tokens that have to come."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from generate_cases import TINY

from ffjax.generation import generate
from ffjax.loop import BLOCK
from ffjax.model import Transformer
from ffjax.sampling.params import SamplingParams
from ffjax.streaming import stream

__all__ = [
    "CIRCLE",
    "CONFIG",
    "FEW",
    "MIXED",
    "NEW",
    "PROMPTS",
    "SAMPLINGS",
    "STRAIGHT",
    "both",
    "float32_model",
    "streamed",
]

# With few tokens, random weights go round in circles.
CONFIG = dataclasses.replace(TINY, vocab_size=23)
CIRCLE = [3, 1, 4, 1, 5, 9, 2, 6] * 4
STRAIGHT = list(range(23))
MIXED = [*STRAIGHT, 7, 8, 9, 10, 2, 2]
PROMPTS = {1: [CIRCLE], 2: [STRAIGHT, CIRCLE], 4: [MIXED, [0], CIRCLE, STRAIGHT[:9]]}
NEW = 5 * BLOCK + 3
FEW = 2 * BLOCK + 1  # all are ordered before the first are here


SAMPLINGS = {
    "penalties": SamplingParams(repetition_penalty=1.05, frequency_penalty=0.02),
    "filters": SamplingParams(temperature=0.7, top_k=6, top_p=0.95, min_p=0.01, seed=2),
    "edits": SamplingParams(logit_bias={3: 1.0}, bad_token_ids=[4], temperature=0.2, seed=3),
    "log-probabilities": SamplingParams(logprobs=3),
    "all": SamplingParams(
        temperature=0.4,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.01,
        min_tokens=30,
        stop_token_ids=[2, 5, 11],
        logprobs=2,
        seed=7,
    ),
}


def float32_model(seed: int = 9, **sizes) -> Transformer:
    """Float32: choices then hang on no rounding that a step of several tokens could change."""
    config = dataclasses.replace(CONFIG, **sizes)
    return Transformer(config, rngs=nnx.Rngs(seed), dtype=jnp.float32)


def both(model, prompts, count, run=generate, **how):
    """What comes without speculation, and with it; all that is to be alike is looked at.

    Also how many tokens were accepted.
    """
    how = {"speculation": "lookup", **how}
    plain = generate(model, prompts, count, **{**how, "speculation": None})
    drafted = run(model, prompts, count, **how)
    assert drafted.tokens == plain.tokens
    assert drafted.finish_reasons == plain.finish_reasons
    assert drafted.stop_reasons == plain.stop_reasons
    for mine, theirs in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert [[one[0] for one in token.top] for token in mine] == [
            [one[0] for one in token.top] for token in theirs
        ]
        numbers = [[[t.logprob, *(p for _, p in t.top)] for t in row] for row in (mine, theirs)]
        np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-5)
    assert plain.accepted is None
    assert drafted.accepted is not None
    return plain, drafted, drafted.accepted


def streamed(*args, **how):
    """What a stream makes; its items are those without speculation."""
    rows = stream(*args, **how)
    items = list(rows)
    plain = list(stream(*args, **{**how, "speculation": None}))
    assert items == plain
    return rows.output
