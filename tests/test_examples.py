"""Every example runs, as README starts it, and prints what it promises."""

import ast
import contextlib
import io
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import pytest

import ffjax

pytestmark = pytest.mark.once(
    "A sample of the examples runs.",
    sample=[
        "test_generate_prints_a_completion_its_speed_and_who_ran_it",
        "test_the_python_in_readme_runs_from_top_to_bottom",
    ],
)

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def _run_alone(name: str, *arguments: str) -> str:
    """What an example prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _run(name: str, *arguments: str, code: int = 0) -> str:
    """What an example prints in this process, which has imported JAX; of an error, to stderr."""
    path, status, out, err = str(EXAMPLES / name), 0, io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [path, *arguments])
        patch.syspath_prepend(EXAMPLES)  # as for a script
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    assert status == code, err.getvalue()
    return (err if code else out).getvalue()


def test_the_main_example_shows_a_text_to_read():
    """Of whole lines that differ, and nothing that is printed again and again."""
    out = _run("generate.py")
    text, figures = out.split("\n\npython-bytes-3m ", 1)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert len(lines) > 8
    assert len(set(lines)) > 0.8 * len(lines)
    assert "They are drawn: temperature 1, top-p 0.8, seed " in figures


def test_generate_prints_a_completion_its_speed_and_who_ran_it():
    prompt = "class Stack:\n    def "
    out = _run_alone("generate.py", "--prompt", prompt, "--max-new-tokens", "60")
    assert out.startswith(prompt)
    completion, figures = out[len(prompt) :].split("\n\npython-bytes-3m ", 1)
    made = re.search(r"made (\d+) tokens: ([\d.]+) tokens/s", figures)
    assert made is not None
    # A byte a token; print ends the text with a newline of its own.
    assert 0 < int(made[1]) == len(completion.encode()) <= 60
    assert float(made[2]) > 0
    assert re.search("implementation='(pallas|xla)' on ", figures)
    # It has learned: the text goes on like Python, in words and not in noise.
    assert re.search(r"[a-z]{3,}", completion)
    assert completion.isascii()


def test_generate_has_no_speed_to_print_of_a_single_token():
    out = _run("generate.py", "--max-new-tokens", "1")
    assert "made 1 token: no decode steps.\n" in out
    assert "nan" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--top-p", "2"), "top_p must be above 0, to 1 (off)"),
        (("--max-new-tokens", "4000"), "python-bytes-3m was made for 2048"),
    ],
)
def test_generate_refuses_what_it_cannot_do(arguments, sentence):
    message = _run("generate.py", *arguments, code=2)
    assert sentence in message
    assert "Traceback" not in message


def test_compare_step_prints_a_small_difference_and_the_same_token():
    out = _run("compare_step.py")
    if jax.default_backend() == "cpu":
        assert "interpreted on the CPU" in out
    found = re.search(r"difference of a logit: (\S+) \(largest logit (\S+)\)", out)
    assert found is not None
    difference, largest = float(found[1]), float(found[2])
    assert largest > 1
    # Two orders of summation in bfloat16, whose steps are 2**-8 of a value.
    assert 0 <= difference < largest / 64
    tokens = re.search(r"Greedy token: kernel (\d+), reference (\d+)", out)
    assert tokens is not None
    assert tokens[1] == tokens[2]


def test_compare_step_refuses_a_prompt_that_does_not_fit():
    message = _run("compare_step.py", "--prompt", "x" * 256, code=2)
    assert "a prompt of 2 to 255 bytes fits; this one has 256" in message


def test_a_prefix_of_embeddings_changes_what_steps_say():
    without, trained = _run("soft_prompt.py").splitlines()
    text = """'print("Hello, " + name)'"""
    assert text not in without
    assert trained.endswith(text)


def test_texts_of_one_kind_have_vectors_that_are_alike():
    found = re.findall(r"^'(\S+).* is nearest to\n    '(\S+)", _run("text_embeddings.py"), re.M)
    assert found == [(kind, kind) for kind in ("def", "def", "#", "#", "import", "import")]


def test_loops_of_ones_own_say_what_generate_says():
    greedy, *drawn = (line.split(": ", 1)[1] for line in _run("own_loop.py").splitlines())
    tokenizer, prompt = ffjax.ByteTokenizer(), "import os\nfrom "
    model = ffjax.load(ffjax.SHIPPED_MODEL)
    out = ffjax.generate(model, tokenizer.encode(prompt), 60, stop_token=ord("\n"))
    assert ast.literal_eval(greedy) == tokenizer.decode(out.tokens[0])
    assert len(set(drawn)) == 3
    assert all(len(ast.literal_eval(line)) == 24 for line in drawn)


def test_the_python_in_readme_runs_from_top_to_bottom(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    # The one about a folder has none here: `test_generator` gives it one.
    blocks = [block for block in blocks if "Llama-3.2-1B" not in block]
    assert len(blocks) == 2
    names: dict = {}
    exec(compile("\n".join(blocks), "README.md", "exec"), names)
    assert names["out"].logits.shape == (1, names["model"].config.vocab_size)
    # The story in four lines: text in, text out.
    assert len(blocks[0].splitlines()) - blocks[0].splitlines().count("") == 4
    prompt = "class Stack:\n    def "
    written = names["generator"].generate(prompt, temperature=0.6, seed=5, max_tokens=80)
    assert capsys.readouterr().out.startswith(written.text)
    assert "self" in written.text
