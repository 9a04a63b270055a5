"""Drawn cases as plans alone, which needs no GPU: who has what, and their hand-overs."""

from __future__ import annotations

import random

from pallas_kernels.gpu import Gpu
from pallas_kernels.stream.planner import make_stream_plan, why_not_on
from pallas_kernels.stream.tuning import Tuning

from .draw import Case, draw_case
from .handovers import HEAD_APART, Model, Protocol
from .orders import faults_of
from .schedules import wrong_in
from .shares import Shares, misowned

__all__ = ["GPUS", "check_plan", "gpu_of", "wrong_with"]

# Those that the kernel is made for, most often; and core counts that nobody makes.
GPUS = (
    *(Gpu.named("H200", "9.0", 132),) * 3,
    Gpu.named("H100", "9.0", 132),
    Gpu.named("H100 PCIe", "9.0", 114),
    Gpu.named("B200", "10.0", 148),
    Gpu.named("RTX 5090", "12.0", 170),
    *(Gpu.named("made up", "9.0", cores) for cores in (1, 3, 7, 16, 46, 97, 256, 320)),
)


def gpu_of(seed: int) -> Gpu:
    """The GPU that a seed's plan is made for."""
    return random.Random(seed ^ 0x5EED).choice(GPUS)


def check_plan(seed: int, protocol: Protocol = HEAD_APART) -> tuple[str, str, Case, Gpu]:
    """What becomes of a seed's plan: "right", "wrong" or "refused", and why.

    Args:
        seed: of case and GPU.
        protocol: of the hand-overs; the kernel's, if none is given.
    """
    gpu = gpu_of(seed)
    case = draw_case(seed, gpu.cores)
    tuning = case.tuned or Tuning()
    if (reason := why_not_on(gpu, case.dims, tuning)) is not None:
        return "refused", reason, case, gpu
    why = wrong_with(case, gpu, protocol)
    return ("right", "", case, gpu) if why is None else ("wrong", why, case, gpu)


def wrong_with(case: Case, gpu: Gpu, protocol: Protocol = HEAD_APART) -> str | None:
    """What is wrong with a case's plan, as a sentence; None if nothing is.

    Args:
        case: what it is made for.
        gpu: the GPU likewise.
        protocol: of the hand-overs; the kernel's, if none is given.
    """
    plan = make_stream_plan(case.dims, gpu, case.tuned or Tuning())
    if wrong := misowned(Shares(plan, case.lengths)):
        return wrong[0]
    model = Model(plan, protocol)
    if faults := faults_of(model, case.step, case.lengths):
        return faults[0].what
    draw = random.Random(case.seed)
    fast, slow = draw.randrange(gpu.cores), draw.randrange(gpu.cores)
    # What clocks say of all schedules, one shows.
    return wrong_in(model, case.step, case.lengths, case.seed, fast, slow)
