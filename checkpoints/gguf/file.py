"""A GGUF file as a model that comes in, and a checkpoint of ours made of one."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

from checkpoints.converting import convert_incoming
from checkpoints.gguf.config import INTERLEAVED, config_json
from checkpoints.gguf.header import MAGIC, Header, read_header
from checkpoints.gguf.integers import KEPT, GGUFIntegers
from checkpoints.gguf.names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, gguf_name
from checkpoints.gguf.tensors import SIZES, GGUFTensor, check_package
from checkpoints.gguf.tokenizer import tokenizer_files
from checkpoints.hf_config import config_from_hf
from checkpoints.hf_fields import CONFIG
from checkpoints.hf_table import Slot, slots_of
from checkpoints.incoming import (
    Conversion,
    Incoming,
    check_tensors,
)
from checkpoints.integers import keep_integers
from checkpoints.manifest import HF_FILES, CheckpointError
from checkpoints.skeleton import array_shapes
from ffjax.config import ModelConfig
from ffjax.settings import own_settings

__all__ = ["GGUFFile", "convert_gguf", "is_gguf", "write_tokenizer"]

_SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file: by its name, or by the first letters of the file."""
    if path.suffix.lower() == _SUFFIX:
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write_tokenizer(path: Path, directory: Path) -> None:
    """Writes the tokenizer of a GGUF file as the files of a Hugging Face folder.

    Args:
        path: the file.
        directory: where to; it is there.

    Raises:
        CheckpointError: the file is damaged, or has no tokenizer of a kind that is supported.
    """
    _write(tokenizer_files(read_header(path)), directory)


def _write(files: dict[str, dict[str, Any]], directory: Path) -> None:
    for name, data in files.items():
        (directory / name).write_text(json.dumps(data), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class GGUFFile(Incoming):
    """A model in a GGUF file, checked from end to end, its numbers not yet read.

    Attributes:
        header: what the file says of itself.
        config_json: its configuration as Hugging Face would write it.
    """

    header: Header
    config_json: dict[str, Any]

    form: ClassVar[str] = "gguf"
    whole: ClassVar[Collection[str]] = tuple(name for name in SIZES if name != "F64")

    @classmethod
    def open(
        cls, path: Path, *, ignore_fields: Collection[str] = (), integers: bool = True
    ) -> GGUFFile:
        """Reads the header of a file, and checks that its tensors are those of its metadata.

        Args:
            path: the file.
            ignore_fields: as in `convert_gguf`.
            integers: as in `convert_gguf`.

        Raises:
            FileNotFoundError: there is nothing at that path.
            CheckpointError: the file is no GGUF file, truncated or damaged, or holds or asks for
                what is not supported.
            NotImplementedError: the package gguf is needed, and not installed.
        """
        if not path.exists():
            raise FileNotFoundError(
                f"There is no GGUF file at {path}. Nothing is downloaded: give a file on this "
                "machine."
            )
        if not path.is_file():
            raise CheckpointError(f"A GGUF file is one file; {path} is a folder. Give the file.")
        header = read_header(path)
        architecture, data = config_json(header, ignore_fields)
        config = config_from_hf(data, path, name=path.name.removesuffix(_SUFFIX))
        slots = slots_of(config, array_shapes(config, "bfloat16"))
        tensors = _by_table(header, slots, config, architecture)
        check_tensors(path, config, slots, tensors, says="metadata", called=gguf_name)
        matrices = {
            name: GGUFIntegers(tensor)
            for name, tensor in tensors.items()
            if tensor.dtype in KEPT and integers
        }
        kept = keep_integers(config, slots, tensors, matrices)
        check_package([one for one in kept.tensors.values() if isinstance(one, GGUFTensor)])
        return cls(path, architecture, kept.config, kept.slots, kept.tensors, [], header, data)

    @functools.cached_property
    def companions(self) -> dict[str, dict[str, Any]]:
        """What a Hugging Face folder has beside the weights: files by name, as `tokenizer_files`.

        Raises:
            CheckpointError: the tokenizer is damaged, or of a kind that is not supported.
        """
        return {CONFIG: self.config_json, **tokenizer_files(self.header)}

    def check_companions(self) -> None:
        """Makes the tokenizer's files; see `Incoming`."""
        _ = self.companions

    def keep_companions(self, checkpoint: Path) -> list[str]:
        """Writes the tokenizer as the files of a Hugging Face folder; see `Incoming`."""
        (directory := checkpoint / HF_FILES).mkdir()
        _write(self.companions, directory)
        return list(self.companions)


def _by_table(
    header: Header, slots: dict[str, list[Slot]], config: ModelConfig, architecture: str
) -> dict[str, GGUFTensor]:
    """The tensors by their names in the table, each with what is to be undone."""
    table = {gguf_name(slot): slot for mine in slots.values() for slot in mine}
    factors = (SHORT_FACTORS, LONG_FACTORS) if architecture == "phi3" else (ROPE_FACTORS,)
    tensors = {}
    for tensor in header.tensors:
        if tensor.name in factors:  # read with the configuration
            continue
        if (slot := table.get(tensor.name)) is None:
            tensors[tensor.name] = tensor
            continue
        heads = 0
        if architecture in INTERLEAVED and slot.ours == "layers.qkv":
            count = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
            heads = count.get(slot.theirs.split(".")[-2], 0)
        # Their norms multiply by the weight; ours, as Hugging Face's, by 1 + the weight.
        norm = slot.theirs.endswith("norm.weight")
        tensors[slot.theirs] = tensor._replace(heads=heads, less=norm * config.norm_offset)
    return tensors


@own_settings()
def convert_gguf(
    file: str | Path,
    path: str | Path,
    *,
    dtype: Any = "bfloat16",
    overwrite: bool = False,
    ignore_fields: Collection[str] = (),
    adapter: str | Path | None = None,
    integers: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Makes a checkpoint of a GGUF file.

    Matrices of the layers, and a head of its own, whose tensors are all of the types Q4_0 and
    Q4_1, or all of Q8_0, keep their integers and scales. Other quantized tensors are made whole,
    and rounded to `dtype`; `ffjax.quantize` makes them small again. The tokenizer and the chat
    template become the files of a Hugging Face folder. As with `convert_hf`, the host holds some
    layers of one array at a time, and an error or Ctrl-C leaves nothing half-written at `path`.

    Args:
        file: the GGUF file, in one part.
        path: the checkpoint to make.
        dtype: of its weights, bfloat16 or float32.
        overwrite: whether a checkpoint already at `path` may be replaced.
        ignore_fields: names of fields of the metadata to leave out: those that are refused
            because they might change what the model computes, where it is known that they do
            not. A field that is understood cannot be ignored.
        adapter: the folder of a LoRA adapter of this model, in peft's format, to be merged into it:
            W + scaling * B @ A for each matrix W `[out, in]`, B `[out, r]`, A `[r, in]`, where
            scaling is lora_alpha / r (arXiv 2106.09685), or lora_alpha / sqrt(r) with use_rslora
            (arXiv 2312.03732). Computed as peft does on a CPU with a model loaded as `dtype`.
        integers: whether integers are kept; False: all tensors are made whole.
        progress: is told, after each tensor, how many bytes were read and of how many.

    Returns:
        What was made and rounded. The model itself: `ffjax.load(path)`.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: there is something at `path`, and overwrite is false or it is no
            checkpoint.
        CheckpointError: the file is no GGUF file, truncated or damaged, or holds or asks for
            what is not supported; or the adapter does, or is one of another model, or the file
            is quantized and an adapter given; or the checkpoint cannot be written.
        NotImplementedError: the package gguf is needed, and not installed.
    """
    return convert_incoming(
        GGUFFile,
        file,
        path,
        dtype=dtype,
        overwrite=overwrite,
        ignore_fields=ignore_fields,
        adapter=adapter,
        integers=integers,
        progress=progress,
    )
