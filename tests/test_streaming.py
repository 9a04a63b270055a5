"""What makes a checkpoint, or loads one, holds some layers of one array, and not the model.

The largest array of a model of 70 billion weights takes 75 GB, and one of its 80 layers 0.9 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from large_folders import Sizes, write_adapter, write_model

ROOT = Path(__file__).parents[1]
SIZES = Sizes(width=512, inner=1024, heads=4, kv_heads=4, vocab=512)
LAYERS = 32
MODEL = LAYERS * 5_242_880  # bytes of the layers' matrices in bfloat16
LARGEST = LAYERS * 2 * 1024 * 512 * 2  # of those gate_up's, the largest array

pytestmark = [
    pytest.mark.once("What is held while files are read and written is ours, and TensorStore's."),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]

# Chunks, blocks and pieces are as much smaller as a layer is smaller than one of those models. Each
# job is done with two layers first, for what is compiled, and for what is kept at hand. The
# allocator gives back what is free: otherwise a job would be told from those before it.
_JOBS = """
import ctypes, gc, json, shutil, sys
from pathlib import Path
import checkpoints, jax
from checkpoints import blocks, lora_merge, quantizing, store
from ffjax.cli import main
from peak_memory import Watch

blocks._CHUNK_BYTES, blocks._BLOCK_BYTES = 1 << 20, 2 << 20
quantizing._PIECE, lora_merge._BLOCK = 1 << 19, 1 << 19
made, layers = sys.argv[1:]
out = Path(made, "out")

def command(*arguments):
    assert main(list(map(str, arguments))) == 0
    shutil.rmtree(out)

def load(path, host):
    store.is_host = lambda: host
    jax.block_until_ready(jax.tree.leaves(checkpoints.load(path)))

def save(path):
    checkpoints.save(checkpoints.load(path), out)
    shutil.rmtree(out)

int4 = "--weights", "int4"
jobs = {
    "convert": lambda at: command("convert", at / "bf16", out),
    "adapter": lambda at: command("convert", at / "bf16", out, "--adapter", at / "lora"),
    "gptq": lambda at: command("convert", at / "gptq", out),
    "packed": lambda at: command("convert", at / "packed", out),
    "gguf": lambda at: command("convert", at / "q4_0.gguf", out),
    "quantize": lambda at: command("quantize", at / "bf16", out, *int4, "--head", "int8"),
    "quantize_ours": lambda at: command("quantize", at / "ours", out, "--weights", "int8"),
    "export": lambda at: command("export", at / "ours", out),
    "load": lambda at: load(at / "ours", True),
    "load_in_blocks": lambda at: load(at / "ours", False),
    "save": lambda at: save(at / "ours"),
}
grown = {}
for at in (Path(made, "2"), Path(made, layers)):
    checkpoints.convert_hf(at / "bf16", at / "ours")
    for name, job in jobs.items():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        watch = Watch()
        before = watch.held
        job(at)
        watch.end()
        grown[name] = watch.held - before
print(json.dumps(grown))
"""


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> dict[str, int]:
    """By how many bytes the memory grew that a process held, by what it did meanwhile."""
    made = tmp_path_factory.mktemp("streaming")
    for layers in (2, LAYERS):
        at = made / str(layers)
        for layout in ("bf16", "gptq", "packed"):
            write_model(at / layout, layout, SIZES, layers)
        write_model(at / "q4_0.gguf", "q4_0", SIZES, layers)
        write_adapter(at / "lora", SIZES, layers)
    done = subprocess.run(
        [sys.executable, "-c", _JOBS, str(made), str(LAYERS)],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",  # of which others wait for each other
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "job",
    ["convert", "adapter", "gptq", "packed", "gguf", "quantize", "quantize_ours", "export"],
)
def test_a_job_holds_less_than_half_of_an_array(grown, job):
    """Not even of the largest one, as long as the layers are many."""
    assert grown[job] < LARGEST / 2


@pytest.mark.parametrize("job", ["load", "load_in_blocks", "save"])
def test_a_model_is_in_memory_once(grown, job):
    """Where the device's memory is the host's. Block by block as on a GPU, and saved, too."""
    assert 0.9 * MODEL < grown[job] < MODEL + LARGEST / 2
