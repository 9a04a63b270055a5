"""Draws to compare the kernel with XLA by; the GPU's tests run them too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ffjax.sampling.choose import choose, empty_board
from ffjax.sampling.draw import sample, sequence_keys, step_keys, words_of
from ffjax.sampling.filters import filtered
from ffjax.sampling.history import Fed, History
from ffjax.sampling.rows import Rows, Stages
from ffjax.settings import own_settings
from pallas_kernels.draw import draw_tokens, make_draw_plan, no_board
from pallas_kernels.gpu import INTERPRETER, Gpu

__all__ = ["DRAWS", "PENALTIES", "check", "check_penalties"]

EVERY = 2**31 - 1
# What each row takes one of: temperature, top_k, top_p and min_p.
DRAWS = {
    "temperature": ((0.0, 0.3, 1.0, 7.0), (EVERY,), (1.0,), (0.0,)),
    "top-k": ((0.7, 1.0, 1.5), (1, 2, 20, 50, 400, EVERY), (1.0,), (0.0,)),
    "top-p": ((0.2, 1.0, 3.0), (EVERY,), (1.0, 0.95, 0.5, 0.1, 1e-6), (0.0,)),
    "min-p": ((0.5, 1.0), (EVERY,), (1.0,), (0.0, 0.05, 0.5, 1.0)),
    "all": ((0.0, 0.6, 1.0, 2.0), (1, 5, 50, EVERY), (0.9, 0.4, 1.0), (0.0, 0.02)),
}
# What each row takes one of: the penalties of repetition, presence and frequency.
PENALTIES = {
    "none": ((1.0, 0.0, 0.0),),
    "repetition": ((1.2, 0.0, 0.0), (1.0 + 2**-20, 0.0, 0.0), (1e6, 0.0, 0.0)),
    "less than 1": ((0.4, 0.0, 0.0), (1.0, -1.5, 0.0), (1.0, 0.0, -0.25), (1e-6, 0.0, 0.0)),
    "presence": ((1.0, 0.7, 0.0), (1.0, 0.0, 0.3), (1.0, 1e6, 0.0)),
    "all": ((1.0, 0.0, 0.0), (1.3, 0.5, 0.1), (0.8, -0.5, 0.2), (1.1, 0.0, 0.0)),
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
            out = kernel(logits, likeliest, words, board, temperature, *filters)
            got, board = out.token, out.board
            want = reference(logits, keys, temperature, *filters)
        assert got.tolist() == want.tolist(), [
            (seed, b, [int(x[b]), float(logits[b, x[b]])], *(y[b].tolist() for y in parameters))
            for b in range(batch)
            for x in (got, want)
            if got[b] != want[b]
        ]


def _reference(logits, keys, temperature, *filters):
    return sample(filtered(logits, temperature, *filters), keys, temperature)


def check_penalties(draws: str | None, batch: int, vocab: int, gpu: Gpu, *, seeds: int) -> None:
    """Compares all that a choice is, by the kernel and by XLA, with tokens that came before.

    Tokens come and go as in a generation: each step feeds the token of the one before. What stops a
    sequence is among the logits, too.

    Args:
        draws: one of `DRAWS`; None: all is greedy.
        batch: B.
        vocab: V.
        gpu: the device.
        seeds: steps with each of `PENALTIES`.
    """
    filters = draws not in (None, "temperature")
    xla = Stages(draws=draws is not None, filters=filters, penalizes=True)
    kernel = dataclasses.replace(xla, gpu=gpu)

    def step(stages, logits, rows, keys, history, board, fed):
        greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        index = jnp.zeros((batch,), jnp.int32)
        return choose(logits, greedy, rows, keys, history, index, stages, board, fed)

    run = jax.jit(step, static_argnums=0)
    rng = np.random.default_rng(batch)
    history = History(
        jnp.asarray(rng.random((batch, vocab)) < 0.05),
        jnp.asarray(rng.integers(0, 9, (batch, vocab)) * (rng.random((batch, vocab)) < 0.1)),
    )
    history = History(history.prompt, history.counts.astype(jnp.int32))
    token = first = jnp.asarray(rng.integers(0, vocab, batch), jnp.int32)
    board = empty_board(batch, vocab, kernel)
    names = [name for name in PENALTIES for _ in range(seeds)]
    for seed, name in enumerate(names):
        logits = rng.normal(size=(batch, vocab)).astype(np.float32) * rng.choice([0.5, 2.0, 6.0])
        # What came before is likely.
        logits += np.asarray(history.counts) * np.float32(0.5) * (seed % 3)
        if seed % 4 == 1:
            logits[:, :: 3 + seed] = logits.max()
        if seed % 4 == 2:
            logits[0], logits[-1, rng.integers(vocab)] = 0.5, rng.choice([np.nan, np.inf])
        if seed % 4 == 3:
            logits[:, rng.permutation(vocab)[: vocab // 2]] = -np.inf
        kinds = rng.permutation(np.resize(PENALTIES[name], (batch, 3)))
        rows = Rows(penalties=jnp.asarray(kinds, jnp.float32))
        if draws is not None:
            temperatures, *rest = DRAWS[draws]
            rows = rows._replace(
                temperature=jnp.asarray(rng.choice(temperatures, batch), jnp.float32)
            )
            if filters:
                top_k = jnp.asarray(rng.choice(rest[0], batch), jnp.int32)
                nucleus = np.stack([rng.choice(each, batch) for each in rest[1:]], axis=1)
                rows = rows._replace(top_k=top_k, nucleus=jnp.asarray(nucleus, jnp.float32))
        fed = Fed(token, first, None if seed % 2 else jnp.asarray(rng.random(batch) < 0.7))
        with own_settings():
            keys = step_keys(sequence_keys(words_of(seed, batch)), 3) if draws is not None else None
            how = jnp.asarray(logits), rows, keys, history
            want = run(xla, *how, None, fed)
            got = run(kernel, *how, board, fed)
        for one, other in ((got.token, want.token), (got.told, want.told)):
            assert one.tolist() == other.tolist(), (name, seed, rows)
        assert (got.history.counts == want.history.counts).all(), (name, seed)
        history, board, token = got.history, got.board, got.token
