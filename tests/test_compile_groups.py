"""Steps of weights in small groups compile for a GPU without one, and spill nothing."""

import os

import pytest
from compile_server import forking
from decode_cases import dims_of
from quantize_cases import GROUPED, INT8_GROUPS, kernel_config
from test_compile_prefill import memory_of

from ffjax.config import preset
from ffjax.formats import FLOATING, INT8, WeightFormats, int4
from ffjax.quantization import quantized_config
from pallas_kernels import compile as compile_module
from pallas_kernels.compile import compile_for, why_no_compiler

pytestmark = [
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
    pytest.mark.skipif(why_no_compiler() is not None, reason=why_no_compiler() or "it is there"),
]


@pytest.fixture(scope="module", autouse=True)
def _forks():
    """One process imports JAX for all workers."""
    with pytest.MonkeyPatch.context() as patch, forking() as run_worker:
        patch.setattr(compile_module, "_run_worker", run_worker)
        yield


@pytest.mark.parametrize(
    ("name", "format", "batch"),
    [
        ("llama3.2-1b", int4(32, "float16"), 1),
        ("llama3.2-1b", int4(32, "float16", "minimum"), 8),
        ("llama3.2-1b", int4(128, "float16", "zero"), 1),
        ("llama3.2-1b", INT8_GROUPS, 8),
        ("llama3.1-8b", int4(32, "float16", "zero"), 1),
    ],
    ids=str,
)
def test_a_step_is_one_kernel_that_spills_nothing(name, format, batch):
    config = quantized_config(preset(name), WeightFormats.of_layers(format, format))
    report = compile_for("h200", dims_of(config, batch, 16_384))
    assert (report.kernels, report.spill_bytes) == (1, 0)


def test_a_step_of_the_widest_rows_is_one_kernel():
    """A thread waits for 32 pieces at once, as many as its word of bits has room for."""
    config = quantized_config(preset("llama3.1-70b"), WeightFormats.of_layers(INT8, INT8))
    assert compile_for("h200", dims_of(config, 8, 16_384)).kernels == 1


@pytest.mark.skipif(
    os.environ.get("JAX_PLATFORMS") != "cpu",
    reason="XLA's CUDA plugin compiles without a GPU where JAX_PLATFORMS=cpu keeps it from one",
)
@pytest.mark.parametrize("gpu", ["l4", "h200"])
def test_a_prefill_of_them_fits(gpu):
    """Each matrix in another format: 2 and 3 groups of 128."""
    memory_of(quantized_config(kernel_config(FLOATING), GROUPED["of files"]), gpu, 32, 128)
    other = quantized_config(kernel_config(FLOATING), GROUPED["of files, otherwise"])
    memory_of(other, gpu, 64, 128)
