"""Models that come in from elsewhere: onto the device, or into a checkpoint of ours.

A folder of Hugging Face and a GGUF file differ in how they are opened. What follows is the same.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from flax import nnx

from checkpoints.arrays import write_blocks
from checkpoints.atomic import written_beside
from checkpoints.blocks import Block, ranges
from checkpoints.hf_files import dtype_name, some
from checkpoints.hf_table import Slot
from checkpoints.host_arrays import empty
from checkpoints.integers import Kept
from checkpoints.manifest import WEIGHTS, CheckpointError, Manifest
from checkpoints.places import check_free
from checkpoints.placing import Placing, is_host
from checkpoints.reordered import Reordered
from checkpoints.skeleton import array_shapes, nested, skeleton
from checkpoints.stored import Stored
from ffjax.config import ModelConfig
from ffjax.model import Transformer

__all__ = [
    "Adapter",
    "Conversion",
    "Incoming",
    "check_tensors",
    "load_incoming",
    "rounding_note",
    "say_rounded",
    "write_incoming",
]

_log = logging.getLogger("ffjax.folders")

# Threads that read: a disk is at its fastest with several requests at a time.
_MOST_THREADS = 16


class Adapter(NamedTuple):
    """An adapter that is merged into a model.

    Attributes:
        name: what it is called: its folder.
        tensors: how many of the model's tensors it changes.
    """

    name: str
    tensors: int


@dataclasses.dataclass(frozen=True)
class Incoming(abc.ABC):
    """A model on disk, checked from end to end, its numbers not yet read.

    Attributes:
        path: where it lies.
        architecture: what it calls itself.
        config: its configuration as ours.
        slots: for each of our arrays the places of its tensors.
        tensors: every tensor, by its name in the table of names.
        left_out: names of tensors in its files that the model has no use for.
        form: what a manifest calls its format.
        whole: dtypes of its tensors that float32 holds exactly.
        adapter: what is merged into it while its numbers are read.
    """

    path: Path
    architecture: str
    config: ModelConfig
    slots: dict[str, list[Slot]]
    tensors: Mapping[str, Stored]
    left_out: list[str]

    form: ClassVar[str]
    whole: ClassVar[Collection[str]]
    adapter: Adapter | None = dataclasses.field(default=None, kw_only=True)

    @classmethod
    @abc.abstractmethod
    def open(
        cls, path: Path, /, *, ignore_fields: Collection[str] = (), integers: bool = True
    ) -> Incoming:
        """Opens what is at a path, and checks it from end to end; its numbers are not yet read.

        Quantized matrices that we know a format of stay integers, if these are wanted.

        Raises:
            FileNotFoundError: there is nothing at that path.
            CheckpointError: it is damaged, or holds or asks for what is not supported.
            NotImplementedError: it needs a package that is not installed.
        """

    @abc.abstractmethod
    def check_companions(self) -> None:
        """Looks at what lies beside the weights and may be refused, before gigabytes are written.

        Raises:
            CheckpointError: it is damaged, or of a kind that is not supported.
        """

    @abc.abstractmethod
    def keep_companions(self, checkpoint: Path) -> list[str]:
        """Puts what lies beside a model's weights into a checkpoint that is being written.

        Args:
            checkpoint: the directory of the checkpoint.

        Returns:
            The relative paths of those there were.
        """

    @property
    def dtypes(self) -> dict[str, int]:
        """How many of the tensors have which dtype, as the files call them."""
        return self._counted(self.tensors.values())

    @staticmethod
    def _counted(tensors: Iterable[Stored]) -> dict[str, int]:
        # What lies beside others, as scales do, is counted with them.
        return dict(sorted(Counter(one.dtype for one in tensors if one.dtype).items()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def source(self, dtype: Any, ignored: Collection[str] = ()) -> dict[str, Any]:
        """Where weights of a dtype that are made of this model come from, for a manifest.

        Args:
            dtype: bfloat16 or float32.
            ignored: fields of its configuration that were left out.
        """
        source = {
            "format": self.form,
            "name": self.config.name,
            "architecture": self.architecture,
            "dtypes": self.dtypes,
            "rounded": self.rounded(dtype),
            "left_out": self.left_out,
        }
        if self.adapter is not None:
            source["adapter"] = self.adapter._asdict()
        return source | ({"ignored_fields": sorted(ignored)} if ignored else {})

    def rounded(self, dtype: Any) -> dict[str, int]:
        """How many tensors, of which dtype, the given one cannot hold exactly."""
        held = self.whole if dtype_name(dtype) == "F32" else (dtype_name(dtype),)
        counts = self._counted(x for x in self.tensors.values() if not isinstance(x, Kept))
        return {name: count for name, count in counts.items() if name not in held}

    def blocks(
        self, dtype: Any, progress: Callable[[int], None] | None = None, *, whole: bool = False
    ) -> Iterator[Block]:
        """The blocks of our arrays, each filled from the files by several threads.

        One exists at a time, as long as the caller keeps no other. Those of integers and of their
        scales come in turn, since some files have both in one place.

        Args:
            dtype: bfloat16 or float32.
            progress: is told, after each tensor, the bytes that were read.
            whole: whether each array comes as one block.
        """
        shapes = array_shapes(self.config, dtype)
        pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
        try:
            for name, leaf in shapes.items():
                scale = f"{name}_scale"
                if name.removesuffix("_scale") in shapes.keys() - {name}:
                    continue  # it has come with its integers
                names = [name, scale] if scale in shapes else [name]
                every = [(0, leaf.shape[0])]
                # Rows that are no layers are those of a tensor, which is read together.
                stacked = isinstance(self.slots[name][0].place[0], int)
                parts = ranges(leaf.shape, leaf.dtype) if stacked else every
                for start, stop in every if whole else parts:
                    for one in names:
                        shape, numbers_dtype = shapes[one].shape[1:], shapes[one].dtype
                        numbers = empty((stop - start, *shape), numbers_dtype)
                        # Part by part, since what a tensor takes while it is read adds up.
                        for a, b in (part for part in parts if start <= part[0] < stop):
                            self._fill(pool, one, a, numbers[a - start : b - start], progress)
                        yield Block(one, start, numbers)
                        del numbers  # before the next is allocated
        finally:
            pool.shutdown(cancel_futures=True)

    def _fill(
        self,
        pool: ThreadPoolExecutor,
        name: str,
        start: int,
        out: np.ndarray,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Reads rows of one of our arrays, from `start` on, into an array of them alone."""
        under_way = [
            (tensor, [pool.submit(tensor.read_into, into, part) for part in tensor.parts()])
            for tensor, into in self._pieces(name, start, out)
        ]
        for tensor, reads in under_way:
            for read in reads:
                read.result()
            if progress is not None:
                progress(tensor.nbytes)

    def _pieces(
        self, name: str, start: int, out: np.ndarray
    ) -> Iterator[tuple[Stored, np.ndarray]]:
        """Every tensor of some rows of one of our arrays, and where it goes among them."""
        for slot in self.slots[name]:
            place = slot.place
            if isinstance(layer := place[0], int):
                if not start <= layer < start + len(out):
                    continue
                place = (layer - start, *place[1:])
            tensor = self.tensors[slot.theirs]
            if slot.order is not None:
                tensor = Reordered(tensor, slot.order)
            yield tensor, out[place]


def check_tensors(
    where: Path,
    config: ModelConfig,
    slots: Mapping[str, list[Slot]],
    tensors: Mapping[str, Stored],
    *,
    says: str,
    called: Callable[[Slot], str] = lambda slot: slot.theirs,
) -> None:
    """Whether the tensors are those of the configuration, each of its shape.

    Args:
        where: the folder or file, for messages.
        config: the configuration.
        slots: the places of all tensors, by our array.
        tensors: those there are, by the name in the table.
        says: where sizes are given, as in "config.json".
        called: what a tensor is called there.

    Raises:
        CheckpointError: some are missing, unknown, or of another shape.
    """
    wanted = {slot.theirs: slot for mine in slots.values() for slot in mine}
    missing = sorted(called(slot) for name, slot in wanted.items() if name not in tensors)
    unknown = sorted(tensor.name for name, tensor in tensors.items() if name not in wanted)
    if missing or unknown:
        wrong = [
            f"{len(names)} {what}: {some(names)}"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise CheckpointError(
            f"The tensors in {where} are not those of a {config.family} model with the sizes "
            f"in its {says}; {'; '.join(wrong)}."
        )
    misshapen = [
        f"{tensor.name} is {list(tensor.shape)}, expected {list(slot.shape)}"
        for name, slot in wanted.items()
        if (tensor := tensors[name]).shape != slot.shape
    ]
    if misshapen:
        raise CheckpointError(
            f"The tensors in {where} have not the shapes that its {says} gives them: "
            f"{some(misshapen, most=3, between='; ')}."
        )


def load_incoming(incoming: Incoming, dtype: Any) -> Transformer:
    """Loads a model onto the default device.

    Beside the model on the device, the host holds a block or two of its arrays at a time.

    Args:
        incoming: the model.
        dtype: bfloat16 or float32.

    Raises:
        CheckpointError: a file was cut short since it was opened.
    """
    say_rounded(incoming, dtype)
    model = skeleton(incoming.config, dtype)
    state = nnx.state(model, nnx.Param)
    placing = Placing(array_shapes(incoming.config, dtype))
    for block in incoming.blocks(dtype, whole=is_host()):
        placing.put(block)
        del block  # before the next is read
    nnx.replace_by_pure_dict(state, nested(placing.arrays))
    nnx.update(model, state)
    return model


def say_rounded(incoming: Incoming, dtype: Any) -> None:
    """Logs how many tensors a dtype cannot hold exactly, if there are any."""
    if rounded := incoming.rounded(dtype):
        _log.info("%s: %s.", incoming.config.name, rounding_note(rounded, dtype))


def rounding_note(rounded: dict[str, int], dtype: Any) -> str:
    """A clause that says how many tensors were rounded."""
    counts = " and ".join(f"{count} of {name}" for name, count in rounded.items())
    return f"tensors were rounded to {np.dtype(dtype).name}: {counts}"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        config: of the model.
        dtype: of the checkpoint's weights.
        rounded: how many tensors of which dtype were rounded to it.
        left_out: names of tensors that the model has no use for.
        companions: files that were kept beside the weights.
        adapter: what was merged into the weights; None, nothing.
    """

    config: ModelConfig
    dtype: str
    rounded: dict[str, int]
    left_out: list[str]
    companions: list[str]
    adapter: Adapter | None = None


def write_incoming(
    incoming: Incoming,
    path: Path,
    *,
    dtype: Any,
    overwrite: bool,
    ignored: Collection[str],
    progress: Callable[[int, int], None] | None,
) -> Conversion:
    """Makes a checkpoint of a model; see `convert_hf`.

    Args:
        incoming: the model.
        path: the checkpoint to make, in full.
        dtype: bfloat16 or float32.
        overwrite: whether a checkpoint already at `path` may be replaced.
        ignored: fields that were left out.
        progress: is told, after each tensor, how many bytes were read and of how many.

    Raises:
        FileExistsError: there is something at `path`.
        CheckpointError: the checkpoint cannot be written.
    """
    total, read = incoming.nbytes, 0

    def count(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress is not None:
            progress(read, total)

    rounded = incoming.rounded(dtype)
    source = incoming.source(dtype, ignored)
    manifest = Manifest(config=incoming.config, dtype=dtype.name, source=source, files={})
    with written_beside(path, lambda: check_free(path, overwrite)) as partial:
        shapes = array_shapes(incoming.config, dtype)
        write_blocks(partial / WEIGHTS, shapes, incoming.blocks(dtype, count))
        companions = incoming.keep_companions(partial)
        manifest.write(partial)
    return Conversion(
        incoming.config, dtype.name, rounded, incoming.left_out, companions, incoming.adapter
    )
