"""The decode step compiles for a GPU without one, to one kernel that fits."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest
from compile_server import forking
from decode_cases import dims_of

from ffjax.commands import compile_table
from ffjax.commands.compile import main
from ffjax.commands.compile_table import Row, Step, compile_row, markdown
from ffjax.config import PRESETS, preset
from ffjax.dims import step_dims
from ffjax.formats import INT8, WeightFormats, int4
from ffjax.quantization import quantized_config
from pallas_kernels import compile as compile_module
from pallas_kernels.compile import (
    CompileError,
    CompileReport,
    compile_for,
    why_no_compiler,
)
from pallas_kernels.stream.layout import SharedLayout
from pallas_kernels.stream.plan import RESERVED_TILE
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.targets import target, target_names

pytestmark = pytest.mark.filterwarnings("error")

needs_compiler = pytest.mark.skipif(
    why_no_compiler() is not None, reason=why_no_compiler() or "it is there"
)


@pytest.fixture(scope="module")
def fork():
    with forking() as run_worker:
        yield run_worker


@pytest.fixture
def forks(monkeypatch, fork):
    """One process imports JAX for all workers."""
    monkeypatch.setattr(compile_module, "_run_worker", fork)


ARCHITECTURES = {
    "8.0": "sm_80",
    "8.6": "sm_86",
    "8.9": "sm_89",
    "9.0": "sm_90a",
    "10.0": "sm_100a",
    "12.0": "sm_120",
}
STEPS = [
    ("llama3.2-1b", "h200", 1),
    ("llama3.2-1b", "h200", 8),
    ("llama3.1-8b", "h200", 1),
    ("python-bytes-3m", "h100", 3),
]


@needs_compiler
@pytest.mark.parametrize(
    ("config", "gpu", "batch"),
    [
        *STEPS,
        ("llama3.2-1b", "a100", 1),
        ("python-bytes-3m", "a100", 2),
        *(("python-bytes-3m", gpu, 1) for gpu in ("b200", "l4", "rtx3090", "rtx4090", "rtx5090")),
    ],
)
def test_a_step_is_one_kernel_that_fits(capsys, monkeypatch, tmp_path, request, config, gpu, batch):
    if (config, gpu) != ("python-bytes-3m", "h100"):  # that one is compiled as a user's
        request.getfixturevalue("forks")
    # Whoever calls it may be anywhere, and know the package from its own path only.
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = ["--config", config, "--gpu", gpu, "--batch", str(batch)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    asked = {"config": config, "gpu": gpu, "batch": batch, "capacity": 16_384}
    assert {name: report[name] for name in asked} == asked
    assert report["kernels"] == 1
    assert report["thunks"] == ["kCustomKernel"]
    wanted = target(gpu).gpu
    assert report["programs"] == wanted.cores
    assert 1024 < report["shared_memory_bytes"] <= wanted.shared_memory
    # 65536 registers a multiprocessor: all programs are resident, one on each.
    assert 32 <= report["registers"] <= min(255, 65_536 // (32 * report["num_warps"]))
    assert report["spill_bytes"] == 0
    assert report["num_stages"] >= 2
    assert report["temp_bytes"] == 0  # the exchange is part of the cache
    # The compiler is made to take shared memory for the ring, of which it knows nothing.
    plan = make_stream_plan(dims_of(preset(config), batch, 16_384), wanted)
    assert report["num_stages"] == plan.num_stages
    assert report["shared_memory_bytes"] >= (plan.num_stages - 1) * RESERVED_TILE
    size = SharedLayout.of(plan).size
    assert plan.slots * plan.slot_bytes < size
    assert size + plan.compiler_bytes <= report["shared_memory_bytes"]
    assert report["arch"] == ARCHITECTURES[wanted.capability]
    assert {"jax", "ptxas"} < set(report["versions"])
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("formats", [("int8", None), ("int4", "int4")], ids=["int8", "int4"])
def test_a_step_of_quantized_weights_is_one_kernel_that_fits(capsys, formats):
    weights, head = formats
    command = ["--config", "llama3.2-1b", "--gpu", "h200", "--batch", "1", "--weights", weights]
    assert main([*command, *(["--head", head] if head else []), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["weights"], report["head"]) == (weights, head)
    assert report["kernels"] == 1
    assert report["spill_bytes"] == 0
    assert report["temp_bytes"] == 0
    assert report["registers"] <= 255
    assert report["shared_memory_bytes"] <= target("h200").gpu.shared_memory


@needs_compiler
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("config", "batch", "formats"),
    [
        # 1B and 8B of one sequence are among `STEPS`.
        ("llama3.2-3b", 1, None),
        ("llama3.1-8b", 8, None),
        ("llama3.1-8b", 8, WeightFormats.of_layers(int4(), INT8)),
    ],
)
def test_all_that_a_streamed_step_carries_stays_in_registers(config, batch, formats):
    made = preset(config) if formats is None else quantized_config(preset(config), formats)
    report = compile_for("h200", dims_of(made, batch, 16_384))
    assert report.spill_bytes == 0


@needs_compiler
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("formats", "batch"), [(INT8, 8), (int4(), 3)], ids=str)
def test_little_of_a_step_of_the_widest_rows_is_spilled(formats, batch):
    """Held as float32 until they are fragments, activations were 3 to 6 KB a thread."""
    made = quantized_config(preset("llama3.1-70b"), WeightFormats.of_layers(formats, INT8))
    report = compile_for("h200", dims_of(made, batch, 16_384))
    assert report.kernels == 1
    assert report.spill_bytes < 200


@needs_compiler
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("config", "batch", "tokens", "gpu"),
    [
        ("llama3.2-1b", 1, 1, "h200"),
        ("llama3.1-8b", 8, 1, "h200"),
        # Queries are normed: 4 rows of 128, a norm of all heads; and 8 rows of 256.
        ("olmo2-1b", 8, 1, "a100"),
        ("gemma3-1b", 1, 8, "h200"),
    ],
)
def test_the_plan_leaves_the_compiler_what_it_takes(config, batch, tokens, gpu):
    """What it takes lies where the ring begins. Without stages nothing is taken for the ring."""
    dims = step_dims(preset(config), batch, 16_384, tokens)
    report = compile_for(gpu, dims, num_stages=1)
    assert report.num_stages == 1
    plan = make_stream_plan(dims, target(gpu).gpu)
    assert 0 < report.shared_memory_bytes <= plan.compiler_bytes


@needs_compiler
def test_the_command_without_json_prints_a_line_a_field(tmp_path):
    command = [sys.executable, "-m", "pallas_kernels.compile", "--config", "python-bytes-3m"]
    command += ["--keep", str(tmp_path / "kept")]
    checkout = pathlib.Path(compile_module.__file__).parent.parent.parent
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    assert re.search(r"^kernels +1$", done.stdout, re.MULTILINE)
    assert re.search(r"^gpu +h200$", done.stdout, re.MULTILINE)
    assert ".entry ffjax_decode_step" in (tmp_path / "kept" / "step.ptx").read_text()
    assert (tmp_path / "kept" / "step.cubin").read_bytes().startswith(b"\x7fELF")


def test_copies_and_fills_count_as_launches(tmp_path):
    """A list of launches as XLA writes it for a step whose cache was not donated."""
    line = "kCustomKernel [source] ffjax_decode_step grid: [132, 1, 1] shared_memory: 512 bytes"
    (tmp_path / "module_0001.jit_decode_step.thunk_sequence.txt").write_text(
        f"000: kCommandBuffer [source | sink]\n  001: kCopy [source] kCopy\n  002: {line}\n"
    )
    assert compile_module._read_thunks(tmp_path) == (["kCopy", "kCustomKernel"], 512)


@pytest.mark.parametrize("missing", ["_plugin", "_ptxas"])
def test_a_missing_compiler_names_the_extra(capsys, monkeypatch, missing):
    monkeypatch.setattr(compile_module, "_plugin", lambda: "a plugin")
    monkeypatch.setattr(compile_module, "_ptxas", lambda: "/bin/ptxas")
    monkeypatch.setattr(compile_module, missing, lambda: None)
    assert main(["--config", "llama3.2-1b", "--json"]) == 1
    told = capsys.readouterr()
    assert not told.out
    assert "pip install 'ffjax[compile]'" in told.err
    assert {"_plugin": "XLA's CUDA plugin", "_ptxas": "ptxas"}[missing] in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "gpt-5"], "No preset is called 'gpt-5'; there are llama3.2-1b"),
        (["--config", "llama3.2-1b", "--gpu", "v100"], "called 'v100'; there are a100, b200, h100"),
        (["--config", "llama3.2-1b", "--batch", "9"], "takes 1 to 8 sequences; there are 9"),
        (
            ["--config", "llama3.1-8b", "--weights", "int8", "--gpu", "l4", "--batch", "8"],
            "of shared memory that are left for them. No tuning has smaller ones: use implementat",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(capsys, arguments, message):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--batch", "--capacity"])
def test_sizes_are_positive(capsys, name):
    with pytest.raises(SystemExit):
        main(["--config", "llama3.2-1b", name, "0"])
    assert f"{name} is a positive number, got 0" in capsys.readouterr().err


@needs_compiler
def test_a_failing_compiler_is_quoted(monkeypatch):
    monkeypatch.setattr(compile_module.compile_worker, "__name__", "pallas_kernels.no_such_module")
    with pytest.raises(CompileError, match=r"did not compile(.|\n)*No module named"):
        compile_for("h200", dims_of(preset("python-bytes-3m"), 1, 64))


@pytest.mark.parametrize("name", target_names())
def test_a_target_agrees_with_the_table_of_gpus(name):
    found = target(name)
    assert f"shared_memory_per_block_optin: {found.gpu.shared_memory}" in found.config
    assert f"core_count: {found.gpu.cores}" in found.config
    assert name in found.gpu.name.lower().replace(" ", "")
    assert re.search(r'device_description_str: "NVIDIA ', found.config)


def test_the_table_says_why_a_step_is_left_to_xla(monkeypatch):
    made = CompileReport(
        gpu="",
        backend="triton",
        kernels=1,
        thunks=[],
        registers=168,
        spill_bytes=20,
        stack_bytes=0,
        shared_memory_bytes=77_824,
        temp_bytes=0,
        programs=1,
        num_warps=4,
        num_stages=2,
        arch="",
        versions={},
    )

    two = dataclasses.replace(made, kernels=2, registers=160, spill_bytes=0)

    def compiled(gpu, dims, *, tuned, backend):
        assert tuned
        assert backend is None
        if dims.weight_bits.qkv == 4:
            raise ValueError("There is no\n room.")
        return made

    monkeypatch.setattr(compile_module, "why_no_compiler", lambda: None)
    monkeypatch.setattr(compile_module, "compile_for", compiled)
    small, quantized = Step("llama3.2-1b", "bfloat16", 1), Step("llama3.2-1b", "int4", 1)
    rows = [compile_row(*pair) for pair in [("h200", small), ("l4", small), ("l4", quantized)]]
    assert [row.report is None for row in rows] == [False, False, True]
    assert markdown([*rows, Row("h200", quantized, two, None)]).splitlines() == [
        "| config | weights | batch | H200 | L4 |",
        "| --- | --- | ---: | ---: | ---: |",
        "| llama3.2-1b | bfloat16 | 1 | 168 (20) | 168 (20) |",
        "| llama3.2-1b | int4 | 1 | 160, 2 launches | XLA (1) |",
        "| steps that spill |  |  | 1 of 2 | 1 of 1 |",
        "| shared memory, bytes |  |  | 77,824 | 77,824 |",
        "| of |  |  | 232,448 | 101,376 |",
        "",
        "1. There is no room.",
    ]


def test_the_table_has_a_column_for_each_backend(monkeypatch, capsys):
    asked = []

    def compiled(gpu, dims, *, tuned, backend):
        asked.append((gpu, dims.model_dim, dims.weight_bits.down, dims.weight_bits.head, backend))
        raise ValueError(f"Not by {backend}.")

    monkeypatch.setattr(compile_module, "why_no_compiler", lambda: None)
    monkeypatch.setattr(compile_module, "compile_for", compiled)
    chosen = ["--gpu", "h200", "--config", "gemma2-2b", "--head", "int8", "--jobs", "1"]
    assert compile_table.main([*chosen, "--backend", "mosaic_gpu", "--backend", "triton"]) == 0
    formats = (16, 16), (16, 16), (8, 8), (8, 8), (4, 8), (4, 8)
    assert asked == [
        ("h200", 2304, weights, head, backend)
        for weights, head in formats
        for backend in ("mosaic_gpu", "triton")
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| config | weights | batch | H200, mosaic_gpu | H200, triton |"
    assert lines[2] == "| gemma2-2b | bfloat16 | 1 | no (1) | no (2) |"
    assert lines[5] == "| gemma2-2b | int8, int8 head | 8 | no (1) | no (2) |"
    assert lines[8] == "| steps that spill |  |  | 0 of 0 | 0 of 0 |"
    assert lines[-2:] == ["1. Not by mosaic_gpu.", "2. Not by triton."]


def test_every_preset_may_be_asked_for():
    every = {step.config for step in compile_table.steps(PRESETS)}
    assert every == set(PRESETS)
    assert len(compile_table.steps(PRESETS)) == 6 * len(PRESETS)
    assert len(compile_table.steps()) == 30  # what docs/gpus.md has


def test_a_table_without_a_compiler_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(compile_module, "why_no_compiler", lambda: "There is no compiler.")
    assert compile_table.main(["--gpu", "l4"]) == 1
    assert "There is no compiler." in capsys.readouterr().err
