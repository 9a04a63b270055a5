"""Each package can be the first that a program imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ffjax

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", ["ffjax", "pallas_kernels", "checkpoints"])
def test_each_package_can_come_first(package):
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_importing_ffjax_imports_no_jax():
    """Its settings are read from the environment then, which a program may still change."""
    done = subprocess.run(
        [sys.executable, "-c", "import ffjax, sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "ffjax" in done.stdout.split()
    assert not {"jax", "flax", "numpy"} & set(done.stdout.split())


def test_a_cache_is_sized_without_pallas():
    """A cache is made for the reference too, which must not need the kernel's backends."""
    done = subprocess.run(
        [sys.executable, "-c", "import ffjax.cache, sys; print(*sys.modules)"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert "pallas_kernels.stream.exchange_layout" in found
    assert not [name for name in found if "pallas" in name and name.startswith("jax")]


@pytest.mark.parametrize("name", ffjax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ffjax, name) is not None
    assert name in dir(ffjax)


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ffjax.nothing  # pyright: ignore[reportAttributeAccessIssue]
