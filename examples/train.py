"""Trains the small model that ffjax ships, on the Python standard library's own sources.

    pip install '.[train]'                   (and '.[cuda13]' for a GPU)
    python examples/train.py --out python-bytes-3m

The master weights are float32; every forward pass runs the reference model on a bfloat16
copy, the very numbers that are saved. The text lies on the device, and one call runs many
optimizer steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

import checkpoints
from ffjax.config import ModelConfig, preset
from ffjax.evaluate import METHOD, bits_per_byte
from ffjax.generation import generate
from ffjax.model import Transformer
from ffjax.stdlib_text import Source, read_sources
from ffjax.tokenizer import ByteTokenizer

PROMPTS = (
    "def read_lines(path):\n",
    "class Queue:\n    def __init__(self",
    "import os\nimport sys\n\n",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train.

    Attributes:
        steps: optimizer steps.
        batch: B, windows a step.
        context: T, predicted tokens a window; a token is predicted from up to T before it.
        learning_rate: the highest, after warming up; a cosine takes it down from there.
        weight_decay: AdamW's, of the matrices of the layers alone.
        seed: of the first weights and of which windows are drawn.
        steps_a_call: steps that run on the device without returning to Python.
    """

    steps: int
    batch: int = 16
    context: int = 2048
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0
    steps_a_call: int = 50

    def __post_init__(self):
        for name in ("steps", "batch", "context", "steps_a_call"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} of a training must be at least 1, got {value}.")
        if self.context % 2:
            raise ValueError(
                f"Evaluation moves on by half a window: context must be even, got {self.context}."
            )


def as_tokens(sources: Sequence[Source]) -> np.ndarray:
    """All files in a row, each between end-of-text tokens: int32 `[n]`."""
    eot = np.array([ByteTokenizer.eot_id], np.int32)
    parts = [eot]
    for source in sources:
        parts += [np.frombuffer(source.text, np.uint8).astype(np.int32), eot]
    return np.concatenate(parts)


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
    """AdamW under a warmed-up cosine, its gradients clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=plan.learning_rate,
        warmup_steps=max(1, min(200, plan.steps // 10)),
        decay_steps=plan.steps,
        end_value=plan.learning_rate / 50,
    )

    def decayed(weights: nnx.State) -> nnx.State:
        matrices = ("qkv", "attn_out", "gate_up", "down")
        return nnx.map_state(lambda path, _: path[-1] in matrices, weights)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=plan.weight_decay, mask=decayed),
    )


def in_bfloat16(weights: Any) -> Any:
    """The weights as the model computes with them, and as they are saved."""
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)


def make_steps(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, plan: Plan
) -> Callable[..., Any]:
    """A jitted function that runs as many steps as its last argument has numbers."""

    def loss_of(weights: nnx.State, windows: Array) -> Array:
        logits = nnx.merge(graph, in_bfloat16(weights))(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def steps(weights, opt_state, tokens: Array, numbers: Array):
        def step(carry, number):
            weights, opt_state = carry
            key = jax.random.fold_in(jax.random.key(plan.seed), number)
            starts = jax.random.randint(key, (plan.batch, 1), 0, tokens.size - plan.context)
            windows = tokens[starts + jnp.arange(plan.context + 1)]
            loss, grads = jax.value_and_grad(loss_of)(weights, windows)
            updates, opt_state = optimizer.update(grads, opt_state, weights)
            return (optax.apply_updates(weights, updates), opt_state), loss

        (weights, opt_state), losses = lax.scan(step, (weights, opt_state), numbers)
        return weights, opt_state, losses

    return jax.jit(steps, donate_argnums=(0, 1))


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a training stands after a call to the device.

    Attributes:
        steps: optimizer steps done so far.
        losses: of each step of the call, bits per token: float64 `[steps of the call]`.
        model: makes the model as it is now, its weights bfloat16. To be called before
            the training goes on.
    """

    steps: int
    losses: np.ndarray
    model: Callable[[], Transformer]


def train(config: ModelConfig, sources: Sequence[Source], plan: Plan) -> Iterator[Progress]:
    """Trains a model.

    Args:
        config: the model's.
        sources: the files to train on.
        plan: how.

    Yields:
        How it stands after every call to the device.

    Raises:
        ValueError: the text is shorter than a window.
    """
    tokens = as_tokens(sources)
    if tokens.size <= plan.context:
        raise ValueError(
            f"A window of {plan.context} tokens needs a longer text than {tokens.size} tokens."
        )
    model = Transformer(config, rngs=nnx.Rngs(plan.seed), dtype=jnp.float32)
    graph, weights = nnx.split(model)
    optimizer = make_optimizer(plan)
    opt_state = optimizer.init(weights)
    steps = make_steps(graph, optimizer, plan)
    on_device = jnp.asarray(tokens)
    for first in range(0, plan.steps, plan.steps_a_call):
        numbers = jnp.arange(first, min(first + plan.steps_a_call, plan.steps))
        weights, opt_state, losses = steps(weights, opt_state, on_device, numbers)
        yield Progress(
            steps=first + numbers.size,
            losses=np.asarray(losses, np.float64) / np.log(2),
            model=lambda now=weights: nnx.merge(graph, in_bfloat16(now)),
        )


def print_samples(model: Transformer, max_new_tokens: int = 200) -> None:
    """Prints what the model makes of a few beginnings, by the reference implementation."""
    tokenizer = ByteTokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    output = generate(
        model,
        prompts,
        max_new_tokens,
        temperature=0.5,
        stop_token=tokenizer.eot_id,
        implementation="xla",
    )
    for prompt, tokens in zip(PROMPTS, output.tokens, strict=True):
        print(f"--- {prompt!r} goes on:\n{prompt}{tokenizer.decode(tokens)}")


def evaluate(model: Transformer, held_out: Sequence[Source], context: int) -> float:
    """Prints and returns bits per byte over the held-out files."""
    result = bits_per_byte(model, [source.text for source in held_out], context=context)
    size = sum(len(source.text) for source in held_out)
    print(
        f"held out: {result:.4f} bits per byte over {len(held_out)} whole files, {size} bytes "
        f"(windows of {context})",
        flush=True,
    )
    return result


def run(plan: Plan, out: Path) -> None:
    """Trains the shipped model, saves it at `out`, and shows what it can do."""
    if out.exists():
        raise FileExistsError(
            f"A training replaces nothing, and there is something at {out}. Name another --out."
        )
    sources, held_out = read_sources()
    facts: dict[str, Any] = {
        "text": "the Python standard library's own sources",
        "python": platform.python_version(),
        "train_files": len(sources),
        "train_bytes": sum(len(source.text) for source in sources),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(source.text) for source in held_out),
        **dataclasses.asdict(plan),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    start = since = time.perf_counter()
    progress = None
    for progress in train(preset("python-bytes-3m"), sources, plan):
        now = time.perf_counter()
        count = len(progress.losses)
        print(
            f"step {progress.steps}: {progress.losses.mean():.4f} bits per token, "
            f"{(now - since) / count * 1e3:.1f} ms a step"
            + (" (with compiling)" if progress.steps == count else ""),
            flush=True,
        )
        since = now
    assert progress is not None
    facts["seconds"] = round(time.perf_counter() - start, 1)
    facts["train_bits_per_token"] = round(float(progress.losses.mean()), 4)
    model = progress.model()
    # Saved before it is evaluated: a mistake from here on does not cost the training.
    checkpoints.save(model, out, source=facts)
    model = checkpoints.load(out)
    facts["held_out_bits_per_byte"] = round(evaluate(model, held_out, plan.context), 4)
    facts["evaluation"] = METHOD
    checkpoints.save(model, out, source=facts, overwrite=True)
    print(f"saved at {out}")
    print_samples(model)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains the small model that ffjax ships.")
    add = parser.add_argument
    add("--steps", type=int, default=4000, help="optimizer steps; default: %(default)s")
    add("--batch", type=int, default=Plan.batch, help="windows a step; default: %(default)s")
    add("--context", type=int, default=Plan.context, help="tokens a window; default: %(default)s")
    add("--learning-rate", type=float, default=Plan.learning_rate, help="default: %(default)s")
    add("--weight-decay", type=float, default=Plan.weight_decay, help="default: %(default)s")
    add("--seed", type=int, default=Plan.seed, help="default: %(default)s")
    add("--steps-a-call", type=int, default=Plan.steps_a_call, help="default: %(default)s")
    add("--out", type=Path, default=Path("python-bytes-3m"), help="default: %(default)s")
    add("--eval-only", metavar="CKPT", type=Path, help="evaluate this checkpoint; train nothing")
    args = vars(parser.parse_args(argv))
    out, evaluated = args.pop("out"), args.pop("eval_only")
    plan = Plan(**args)
    if evaluated is None:
        run(plan, out)
        return
    model = checkpoints.load(evaluated)
    evaluate(model, read_sources()[1], plan.context)
    print_samples(model)


if __name__ == "__main__":
    main()
