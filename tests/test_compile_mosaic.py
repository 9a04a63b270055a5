"""Steps compile by Mosaic GPU without a GPU, each to one kernel that spills next to nothing."""

import json

import pytest

from ffjax.commands.compile import main
from pallas_kernels.compile import why_no_compiler
from pallas_kernels.stream.planner import COMPILER_BYTES
from pallas_kernels.targets import target

needs_compiler = pytest.mark.skipif(
    why_no_compiler() is not None, reason=why_no_compiler() or "it is there"
)

# Bytes that ptxas finds no room for, where Triton's kernel has 248 registers.
FEW = {"--config gemma3-1b --batch 8": 20}


@needs_compiler
@pytest.mark.parametrize(
    "step",
    [
        "--config llama3.2-1b",
        "--config llama3.2-1b --batch 8",
        "--config llama3.1-8b --weights int4 --batch 8",
        "--config gemma3-1b --batch 8",
        "--config olmo2-1b --weights int8 --batch 2 --tokens 4",
    ],
)
def test_a_step_is_one_kernel_that_fits(capsys, step):
    assert main([*step.split(), "--backend", "mosaic_gpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # One call, and neither a copy of the cache, which is updated in place, nor a fill.
    assert (report["backend"], report["thunks"]) == ("mosaic_gpu", ["kCustomCall"])
    gpu = target("h200").gpu
    assert report["programs"] == gpu.cores
    # 65536 registers a multiprocessor: all programs are resident, one on each.
    assert 32 <= report["registers"] <= min(255, 65_536 // (32 * report["num_warps"]))
    assert report["spill_bytes"] <= FEW.get(step, 0)
    assert COMPILER_BYTES < report["shared_memory_bytes"] <= gpu.shared_memory
    # No copy of an input or of a result either.
    assert report["temp_bytes"] < 1024


def test_an_older_gpu_is_left_to_triton(capsys):
    asked = ["--config", "llama3.2-1b", "--gpu", "a100", "--backend", "mosaic_gpu"]
    assert main(asked) == 1
    said = capsys.readouterr().err
    assert "compute capability 9.0 and newer, got NVIDIA A100" in said
    assert "of 8.0. Take Triton, which" in said
