"""Saving and restoring a model: Orbax for the weights, a manifest for the rest.

A checkpoint is a directory:

    manifest.json    format, configuration, dtype, source, and the sizes of the files below
    weights/         the weights, as Orbax lays them out
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict

from checkpoints.interrupts import interrupts_held_back
from checkpoints.manifest import DTYPES, MANIFEST, CheckpointError, Manifest
from ffjax.config import ModelConfig
from ffjax.model import Transformer

__all__ = ["SHIPPED_MODEL", "load", "save"]

SHIPPED_MODEL: Path = Path(__file__).parent / "shipped"
"""The trained model that is installed with the package; see MODEL_CARD.md."""

_WEIGHTS = "weights"


def save(
    model: Transformer,
    path: str | Path,
    *,
    source: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model: its weights, bit by bit, and its configuration.

    Everything is written beside `path` and renamed to it at the end: an error or Ctrl-C
    leaves nothing half-written at `path`, and a checkpoint that was there as it was.

    Args:
        model: the model, its weights all bfloat16 or all float32.
        path: the directory to make; the directories above it are made too.
        source: where the weights come from, JSON-able; kept in the manifest.
        overwrite: whether a checkpoint already at `path` may be replaced.

    Raises:
        FileExistsError: there is something at `path`, and overwrite is false or it is
            no checkpoint.
        CheckpointError: the weights are of another dtype, or of several.
        TypeError: the source is not JSON-able.
    """
    path = Path(path).expanduser().resolve()
    weights = _weights(nnx.state(model, nnx.Param))
    manifest = Manifest(config=model.config, dtype=_dtype_of(weights), source=source, files={})
    manifest.to_json()  # a source that cannot be kept is refused before the weights are written
    _check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _removed_at_end(_beside(path, "partial")) as partial:
        partial.mkdir()
        with (
            interrupts_held_back(),
            ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer,
        ):
            checkpointer.save(partial / _WEIGHTS, args=ocp.args.StandardSave(weights))
        # Orbax notes here where it wrote, a name that is about to go. It reads without it.
        (partial / _WEIGHTS / "commit_success.txt").unlink(missing_ok=True)
        files = (file for file in (partial / _WEIGHTS).rglob("*") if file.is_file())
        sizes = {file.relative_to(partial).as_posix(): file.stat().st_size for file in files}
        dataclasses.replace(manifest, files=sizes).write(partial)
        _check_free(path, overwrite)
        _move_into_place(partial, path)


def load(path: str | Path, *, dtype: Any = None) -> Transformer:
    """Loads a model that `save` wrote.

    The weights are restored into the places of a model that was never allocated, on
    the default device: no second copy of them exists at any time.

    Args:
        path: the checkpoint's directory.
        dtype: bfloat16 or float32, to which the weights are cast; None: as they were
            saved, bit by bit.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: what is there is no checkpoint, a damaged or truncated one, or
            one that a newer version wrote; or the dtype is another.
    """
    path = Path(path).expanduser().resolve()
    if dtype is not None:
        dtype = _supported("The weights are loaded as", dtype)
    manifest = Manifest.read(path)
    _check_files(path, manifest)
    model = _skeleton(manifest.config, manifest.dtype)
    state = nnx.state(model, nnx.Param)
    # Orbax notes the device that each array was saved from. Saying where it is to go
    # lets a model saved on one machine be loaded on another.
    place = jnp.zeros(()).sharding

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place)

    targets = jax.tree.map(target, _weights(state))
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            _check_arrays(path, checkpointer.metadata(path / _WEIGHTS), _weights(state))
            weights = checkpointer.restore(path / _WEIGHTS, args=ocp.args.StandardRestore(targets))
    except CheckpointError:
        raise
    except Exception as error:
        # Orbax and TensorStore raise errors of many kinds, and long ones.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"The checkpoint at {path} is damaged: Orbax cannot read its weights "
            f"({reason[0]}). Copy or save it again."
        ) from error
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(model, state)
    return model


def _skeleton(config: ModelConfig, dtype: Any) -> Transformer:
    """A model with shapes in place of weights."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))


def _weights(state: nnx.State) -> dict[str, Any]:
    """The arrays by the names of their attributes: what Orbax is handed."""
    return nnx.to_pure_dict(state)


def _supported(what: str, dtype: Any) -> Any:
    """The dtype, if a checkpoint may have it."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise CheckpointError(f"{what} one of {', '.join(DTYPES)}; got {name}.")
    return jnp.dtype(dtype)


def _dtype_of(weights: dict[str, Any]) -> str:
    """The one dtype of all weights."""
    names = sorted({leaf.dtype.name for leaf in jax.tree.leaves(weights)})
    if len(names) > 1:
        raise CheckpointError(
            f"A model's weights share one dtype; these have {', '.join(names)}. "
            "Cast them before saving."
        )
    return _supported("A checkpoint's weights are", names[0]).name


def _check_files(path: Path, manifest: Manifest) -> None:
    """Whether every file of the weights is there, whole."""
    for name, size in manifest.files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise CheckpointError(
                f"The checkpoint at {path} is incomplete: {name} is missing. Copy or save it again."
            ) from None
        if found != size:
            raise CheckpointError(
                f"The checkpoint at {path} is damaged: {name} has {found} bytes, and was saved "
                f"with {size}. Copy or save it again."
            )


def _described(tree: dict[str, Any]) -> dict[str, str]:
    """Dtype and shape of every array, by its dotted name."""
    leaves: dict[str, Any] = flatten_dict(tree, sep=".")
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _check_arrays(path: Path, metadata: Any, wanted: dict[str, Any]) -> None:
    """Whether the weights are those that the manifest promises, before any is read."""
    stored, expected = _described(metadata.item_metadata.tree), _described(wanted)
    for name in sorted(stored.keys() | expected.keys()):
        if (found := stored.get(name)) != (needed := expected.get(name)):
            raise CheckpointError(
                f"The weights of the checkpoint at {path} are not those of its {MANIFEST}: "
                f"{name} is {found or 'missing'}, and the model there has "
                f"{needed or 'no such weight'}. Copy or save it again."
            )


def _check_free(path: Path, overwrite: bool) -> None:
    """Whether a checkpoint may be put at `path`."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"A save replaces nothing unless asked to, and there is something at {path}. Save "
            "elsewhere, or pass overwrite=True."
        )
    try:
        Manifest.read(path)
    except CheckpointError as error:
        # A mistyped path must not cost somebody their files.
        raise FileExistsError(
            f"A save replaces a checkpoint and nothing else. {error} Save elsewhere."
        ) from None


def _beside(path: Path, role: str) -> Path:
    """A free name beside `path`, hence on the same file system."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{role}"


@contextlib.contextmanager
def _removed_at_end(directory: Path) -> Iterator[Path]:
    """The directory, removed with what is left of it, whatever happens."""
    try:
        yield directory
    finally:
        with interrupts_held_back():
            shutil.rmtree(directory, ignore_errors=True)


def _move_into_place(partial: Path, path: Path) -> None:
    """Renames the finished checkpoint to `path`; one that was there goes last."""
    if not path.exists():
        partial.rename(path)
        return
    old = _beside(path, "replaced")
    with interrupts_held_back():
        path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            old.rename(path)  # what was there comes back
            raise
        shutil.rmtree(old, ignore_errors=True)
