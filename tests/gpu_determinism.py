"""The same generation in several processes: are its bits the same, and what does that cost?

    python tests/gpu_determinism.py --config llama3.2-1b --options none ours --processes 3

Each process makes the same random weights, reads the same prompt and prints hashes of the
prefill's logits and of the tokens of each implementation, and the time that the prefill took.
One line a process, then one a set of options; exit code 1 where ours differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

__all__ = ["OPTIONS", "run_once", "same"]

# Of XLA. None: those that ffjax has.
OPTIONS: dict[str, dict[str, Any] | None] = {
    "ours": None,
    "none": {},
    "level-0": {"xla_gpu_autotune_level": 0},
    "level-0-cublas": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "deterministic-ops": {"xla_gpu_deterministic_ops": True},
    "no-nondeterministic": {"xla_gpu_exclude_nondeterministic_ops": True},
}
_HASHES = ("weights", "logits", "tokens")
_TIMED = 10


def _arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="llama3.2-1b")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=["none", "ours"])
    parser.add_argument("--child", choices=OPTIONS, help="be one of the processes")
    return parser.parse_args(argv)


def _hash(array: Any) -> str:
    import numpy as np

    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()[:16]


def _child(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np
    from flax import nnx

    from ffjax import reproducible
    from ffjax.cache import KVCache
    from ffjax.config import preset
    from ffjax.decode import Implementation, choose_kernel, device_of
    from ffjax.generation import generate
    from ffjax.model import Transformer
    from ffjax.streaming import stream

    if (options := OPTIONS[args.child]) is not None:
        reproducible.SAME_IN_EVERY_PROCESS.clear()
        reproducible.SAME_IN_EVERY_PROCESS.update(options)
    config = preset(args.config)
    model = nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, config.vocab_size, args.prompt_tokens)

    # By itself, as a whole: generation feeds it in chunks and keeps no logits.
    def prefill(state, cache, tokens):
        return nnx.merge(graph, state)(tokens, cache, last_only=True)[0]

    cache = KVCache.create(config, 1, args.prompt_tokens + args.new_tokens, model.dtype)
    compiler_options = reproducible.compiler_options(device_of(model))
    logits = jax.jit(prefill, compiler_options=compiler_options)(state, cache, prompt[None])
    fused, _ = choose_kernel(config, model.dtype, 1, cache.capacity)
    names: list[Implementation] = ["xla", *([fused] if fused else [])]
    made = {name: generate(model, prompt, args.new_tokens, implementation=name) for name in names}
    runs = [generate(model, prompt, args.new_tokens) for _ in range(_TIMED)]
    first = []
    for _ in range(_TIMED):
        steps = stream(model, prompt, args.new_tokens)
        next(steps)
        first.append(steps.output.prefill_seconds)
        steps.close()
    return {
        "options": args.child,
        "device": device_of(model).device_kind,
        "weights": _hash([_hash(leaf) for leaf in jax.tree.leaves(state)]),
        "logits": _hash(logits),
        "tokens": {name: _hash(out.tokens[0]) for name, out in made.items()},
        # The same programs again, in this process.
        "reruns": sorted({_hash(run.tokens[0]) for run in runs}),
        "prefill_ms": round(1e3 * statistics.median(run.prefill_seconds for run in runs), 3),
        "stream_prefill_ms": round(1e3 * statistics.median(first), 3),
        "token_ms": round(
            1e3 * statistics.median(run.decode_seconds / max(run.steps, 1) for run in runs), 4
        ),
        "compile_s": round(max(out.compile_seconds for out in made.values()), 1),
    }


def run_once(options: str, config: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """What one process of its own says.

    Args:
        options: a name of OPTIONS.
        config: a preset of ffjax.
        prompt_tokens: how long the prompt is.
        new_tokens: how many follow.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, str(pathlib.Path(__file__)), "--child", options, "--config", config]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    # A program from the cache of compiled programs would agree with itself.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    # Also from a checkout that is not installed.
    paths = str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-5:]))
    return json.loads(done.stdout.splitlines()[-1])


def same(reports: list[dict[str, Any]]) -> bool:
    """Whether processes said the same of weights, logits and tokens."""
    return all(report[name] == reports[0][name] for report in reports for name in _HASHES)


def main() -> int:
    """The command; returns its exit status."""
    args = _arguments()
    if args.child:
        print(json.dumps(_child(args)))
        return 0
    code, size = 0, (args.config, args.prompt_tokens, args.new_tokens)
    for options in args.options:
        reports = []
        try:
            for _ in range(args.processes):
                reports.append(run_once(options, *size))
                print(json.dumps(reports[-1]), flush=True)
        except RuntimeError as error:
            print(f"{options}: failed: {error}", flush=True)
            continue
        agree = {name: len({json.dumps(r[name]) for r in reports}) == 1 for name in _HASHES}
        print(f"{options}: the same in {len(reports)} processes: {agree}", flush=True)
        if options == "ours" and not same(reports):
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
