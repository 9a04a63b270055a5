"""A program that ends while its device is still at steps."""

import os
import subprocess
import sys
from pathlib import Path

# A model whose block of steps takes longer than Python's end: the last one is left behind.
_PROGRAM = """
import dataclasses
import ffjax
from flax import nnx
config = ffjax.preset("llama3.2-1b")
config = dataclasses.replace(config, num_layers=1, vocab_size=20_000)
model = ffjax.Transformer(config, rngs=nnx.Rngs(0))
steps = ffjax.stream(model, [[1, 2, 3]], 100)
next(steps)
steps.close()
print("left", flush=True)
"""


def test_steps_that_nobody_reads_do_not_abort_the_process():
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
