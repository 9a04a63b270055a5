"""Looks for the fused kernel's fastest tuning on this device, and prints it as a table's row.

Random weights of the configuration's shapes are made on the device. Every candidate's step is
compared with the reference before it is timed. The row belongs into
`pallas_kernels/stream/tuned.json`. The exit code is 1 where no candidate computes the step.
"""

from __future__ import annotations

import argparse
import json
import sys

from ffjax.commands.options import whole
from ffjax.commands.sizes import add_size_arguments, chosen_sizes
from ffjax.failures import without_advice

__all__ = ["HELP", "add_arguments", "run"]

HELP = "find the fused kernel's fastest tuning on this device"

_NONE_SOUND = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax tune`."""
    add_size_arguments(parser)
    parser.add_argument(
        "--batch", metavar="B", type=whole(1), default=1, help="sequences; default: %(default)s"
    )
    parser.add_argument(
        "--tokens",
        metavar="T",
        type=whole(1),
        default=1,
        help="tokens of each sequence that a step takes; default: %(default)s",
    )
    parser.add_argument(
        "--position",
        metavar="P",
        type=whole(0),
        default=96,
        help="live positions before the first step; default: %(default)s",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=whole(1),
        default=64,
        help="steps of a loop; default: %(default)s",
    )
    parser.add_argument(
        "--repetitions",
        metavar="N",
        type=whole(7),
        default=7,
        help="timed loops, 7 or more; default: %(default)s",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )


def run(args: argparse.Namespace) -> int:
    """Prints a line a candidate and the best one's row on stdout; or JSON."""
    import jax.numpy as jnp

    from ffjax.benchmark.inputs import capacity_for, random_model
    from ffjax.benchmark.suite import Sweep
    from ffjax.benchmark.tune import tune
    from ffjax.decode import default_device, why_not_fused_config
    from ffjax.dims import step_dims
    from pallas_kernels.gpu import Gpu
    from pallas_kernels.stream.tuning import row_key

    config = chosen_sizes(args, "tune")
    # It refuses what cannot be measured.
    Sweep(
        config=config,
        batches=(args.batch,),
        positions=(args.position,),
        steps=args.steps,
        repetitions=args.repetitions,
        implementation="pallas",
        tokens=(args.tokens,),
    )
    device = default_device()
    gpu = Gpu.of(device)
    capacity = capacity_for(args.position, args.steps, args.tokens)
    reason = why_not_fused_config(config, jnp.bfloat16, args.batch, capacity, args.tokens)
    if reason is not None or gpu is None:
        raise NotImplementedError(without_advice(reason or "There is no GPU here."))
    model = random_model(config)
    dims = step_dims(config, args.batch, capacity, args.tokens)

    def say(text: str) -> None:
        if not args.json:
            print(f"ffjax tune: {text}", file=sys.stderr, flush=True)

    trials = tune(model, dims, gpu, args.position, args.steps, args.repetitions, say=say)
    sound = [trial for trial in trials if trial.sound]
    row = None
    if sound and (timing := sound[0].timing) is not None:
        row = {
            **row_key(gpu.name, dims),
            "tuning": vars(sound[0].tuning),
            "us_per_step": round(1e6 * timing.step_seconds, 1),
            "config": config.name,
        }
        if config.weights.quantized:
            row["quantized"] = str(config.weights)
    if args.json:
        print(json.dumps({"row": row, "trials": [_data(trial) for trial in trials]}))
    else:
        for trial in trials:
            print(_line(trial))
        print(json.dumps(row))
    return 0 if row is not None else _NONE_SOUND


def _data(trial) -> dict:
    timing = trial.timing
    return {
        "tuning": vars(trial.tuning),
        "us_per_step": None if timing is None else 1e6 * timing.step_seconds,
        "spread": None if timing is None else timing.spread,
        "relative_error": trial.relative_error if trial.relative_error < float("inf") else None,
        "repeats": trial.repeats,
        "failure": trial.failure,
    }


def _line(trial) -> str:
    plan, tuning = trial.plan, trial.tuning
    shape = (
        f"tiles of {plan.rows} rows, {plan.slots} slots of {plan.slot_bytes} bytes, "
        f"{plan.in_flight} in flight, {tuning.l2_tiles} ahead by {tuning.l2_bytes} bytes, "
        f"{plan.next_tiles} of the next segment, {tuning.collect_tiles} with activations, "
        f"{tuning.hidden_copies} copies, {plan.num_warps} warps"
    )
    if trial.timing is None:
        return f"  does not compile  {shape}: {trial.failure}"
    sound = "" if trial.sound else "  WRONG"
    return (
        f"{1e6 * trial.timing.step_seconds:8.1f} us  spread {trial.timing.spread:.1%}  "
        f"{shape}, error {trial.relative_error:.1e}{sound}"
    )
