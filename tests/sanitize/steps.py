"""Takes a case's decode steps on the GPU: the process that compute-sanitizer watches.

Nothing else runs on the GPU, and all that the steps read was copied there from the host: so that
whatever is found is found in them, and nothing that they read is unknown to the tool.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys

import jax
import numpy as np
from as_if import take_device_for
from decode_cases import filled_cache, random_model, random_tokens
from flax import nnx

from ffjax.decode import DecodeOutput, fused_step
from sanitize.apart import APART, put_apart
from sanitize.cases import CASES, Case
from sanitize.planted import plant

__all__ = ["DONE", "take_steps"]

STEPS = 3
DONE = "steps taken"


def take_steps(
    case: Case, steps: int = STEPS, planted: str | None = None, apart: bool = False
) -> np.ndarray:
    """Takes steps on the default device; returns the last one's logits, `[B, V]` or `[B, T, V]`.

    Args:
        case: which.
        steps: how many, each fed the tokens of the one before it.
        planted: name of an error to plant in the kernel.
        apart: whether each thread has places of its own: see `apart`.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        graph, params = nnx.split(random_model(case.config))
        tokens = random_tokens(case.config, len(case.lengths), tokens=case.tokens)
        cache = filled_cache(case.config, case.lengths, case.capacity, tokens=case.tokens)
        here = jax.tree.map(np.asarray, (params, cache, tokens))
    params, cache, tokens = jax.device_put(here, jax.devices()[0])

    def step(params, cache, tokens) -> DecodeOutput:
        return fused_step(nnx.merge(graph, params), cache, tokens)

    with contextlib.ExitStack() as changes:
        if apart:
            changes.enter_context(put_apart())
        if planted is not None:
            changes.enter_context(plant(planted))
        lowered = jax.jit(step, donate_argnames="cache").lower(params, cache, tokens)
    take, logits = lowered.compile(), None
    for _ in range(steps):
        out = take(params, cache, tokens)
        cache, tokens, logits = out.cache, out.token, out.logits
    return np.asarray(logits)


def main(name: str, *changes: str) -> None:
    """Takes a case's steps, and says so, with a digest of the last logits.

    Args:
        name: of the case.
        changes: of the kernel: `APART`, and the name of an error to plant.
    """
    planted = [change for change in changes if change != APART]
    case = CASES[name]
    if case.gpu is not None:
        take_device_for(case.gpu)
    logits = take_steps(case, planted=next(iter(planted), None), apart=APART in changes)
    if not planted and not np.isfinite(logits).all():
        sys.exit(f"The logits of {name!r} are not finite.")
    print(DONE, hashlib.sha256(logits.tobytes()).hexdigest()[:16], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
