"""The commands that are no part of the package: they run from the checkout, and know its tests."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once("They are for who works on the kernel, with one Python.")

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("command", "option"),
    [("search", "--plans"), ("sanitize", "--planted"), ("soak", "--processes")],
)
def test_it_is_a_command_of_the_checkout(command, option):
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{command}", "--help"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert option in done.stdout
