"""Every example runs, as README starts it, and prints what it promises."""

import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def _run(name: str, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_generate_prints_a_completion_its_speed_and_who_ran_it():
    prompt = "class Stack:\n    def "
    out = _run("generate.py", "--prompt", prompt, "--max-new-tokens", "60")
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


@pytest.fixture
def jax_settings():
    """Settings that README changes, as they were."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    yield before
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_python_in_readme_runs_from_top_to_bottom(capsys, jax_settings):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    # Those about a folder have none here: `test_hf_tokenizer` and `test_generator` give them one.
    blocks = [block for block in blocks if "Llama-3.2-1B" not in block]
    assert len(blocks) == 4
    names: dict = {}
    exec(compile("\n".join(blocks), "README.md", "exec"), names)
    assert names["out"].logits.shape == (1, names["model"].config.vocab_size)
    printed = capsys.readouterr().out
    assert printed.split()[-1] in ("xla", "pallas")
    assert len(printed) > 50
    # The story in four lines: text in, text out.
    assert len(blocks[0].splitlines()) - blocks[0].splitlines().count("") == 4
    written = names["generator"].generate(
        "class Stack:\n    def ", temperature=0.5, seed=1, max_tokens=80
    )
    assert printed.startswith(written.text)
    assert "self" in written.text
    # The block on settings comes last, behind all that compiles.
    assert all(getattr(jax.config, name) != value for name, value in jax_settings.items())
