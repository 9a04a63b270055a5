"""LoRA adapters in peft's format: opened, held against their model, and merged into it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from checkpoints.hf_adapter import ADAPTER
from checkpoints.hf_files import (
    FLOATS,
    StoredTensor,
    broken_link,
    check_dtypes,
    read_header,
    some,
)
from checkpoints.hf_table import EMBED, HEAD, NameRules
from checkpoints.incoming import Adapter, Incoming
from checkpoints.lora_config import MERGE_BY_PEFT, LoraConfig
from checkpoints.lora_merge import Factors, MergedTensor
from checkpoints.manifest import CheckpointError, a_file, nothing_at
from checkpoints.places import check_apart, real_path
from checkpoints.stored import Stored

__all__ = ["merge_adapter"]

_WEIGHTS = "adapter_model.safetensors"
_TORCH = "adapter_model.bin"

# What peft puts before a module's name, and after it; and the part that the tensor is.
_BEFORE = "base_model.model."
_A, _B, _WHOLE = "A", "B", "whole"
_LINEAR = {".lora_A.weight": _A, ".lora_B.weight": _B}
_EMBEDDING = {".lora_embedding_A": _A, ".lora_embedding_B": _B}
# A module's own matrix: peft saves those of the head and the embedding with their adapters.
_OWN = {".base_layer.weight": _WHOLE, ".weight": _WHOLE}


def merge_adapter(incoming: Incoming, directory: str | Path, *, out: Path) -> Incoming:
    """Opens an adapter, checks that it is one of a model, and merges it; no number is read yet.

    Args:
        incoming: the model.
        directory: the adapter's folder: `adapter_config.json` and `adapter_model.safetensors`.
        out: the checkpoint that is to be made, in full.

    Returns:
        The model, whose numbers come merged.

    Raises:
        FileNotFoundError: there is nothing at that path.
        CheckpointError: the adapter is damaged or incomplete, asks for what is not supported, or
            is one of another model; or the model's weights are quantized.
    """
    check_apart(out, directory := real_path(directory))
    if not directory.exists():
        raise FileNotFoundError(nothing_at(directory, "folder of an adapter"))
    if not directory.is_dir():
        raise CheckpointError(a_file(directory))
    config = LoraConfig.read(directory)
    _check_whole(incoming)
    modules = _modules(_read_tensors(directory), incoming, directory)
    _check_embedding(modules, incoming, directory)
    tensors = dict(incoming.tensors)
    for name, module in modules.items():
        tensors[name] = module.merged(tensors[name], config)
    _check_all_there(modules, incoming, config)
    adapter = Adapter(directory.name, len(modules))
    return dataclasses.replace(incoming, tensors=tensors, adapter=adapter)


def _check_whole(incoming: Incoming) -> None:
    """Whether no tensor of the model is quantized."""
    if quantized := sorted(set(incoming.dtypes) - set(FLOATS)):
        raise CheckpointError(
            f"An adapter is merged into weights of {', '.join(FLOATS)}; {incoming.path} has "
            f"{', '.join(quantized)}. Give a version of the model whose weights are not quantized."
        )


def _read_tensors(directory: Path) -> list[StoredTensor]:
    """The tensors of an adapter, none of them read."""
    if (link := broken_link(directory, _WEIGHTS)) is not None:
        raise CheckpointError(link)
    if not (directory / _WEIGHTS).is_file():
        if (directory / _TORCH).is_file():
            has, hint = _TORCH, "Load the adapter by peft, and save it (save_pretrained)."
        else:
            has, hint = "no such file", "Download or copy the folder again."
        raise CheckpointError(
            f"The weights of an adapter are read from {_WEIGHTS}; {directory} has {has}. {hint}"
        )
    tensors = read_header(directory / _WEIGHTS)
    names = [tensor.name for tensor in tensors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(
            f"A tensor's name is there once; {directory} has twice: {some(twice)}."
        )
    check_dtypes(directory, tensors)
    return tensors


@dataclasses.dataclass
class _Module:
    """What an adapter has of one module.

    Attributes:
        called: the module, as the adapter calls it.
        where: the adapter's folder.
        shape: of the model's tensor.
        is_embedding: whether it is the embedding.
        is_head: whether it is the head.
        tensors: its tensors, by the part that each is.
    """

    called: str
    where: Path
    shape: tuple[int, ...]
    is_embedding: bool
    is_head: bool
    tensors: dict[str, StoredTensor]

    def merged(self, base: Stored, config: LoraConfig) -> Stored:
        """The model's tensor with this merged into it.

        Raises:
            CheckpointError: of A and B one is missing or of another shape, or the configuration
                gives the module no adapter.
        """
        if (own := self.tensors.get(_WHOLE)) is not None:
            self._check_shape(own, self.shape, "the model's configuration")
            base = own
        a, b = self.tensors.get(_A), self.tensors.get(_B)
        if a is None and b is None:
            return base
        if a is None or b is None:
            there, missing = (b, "A") if a is None else (a, "B")
            assert there is not None
            raise CheckpointError(
                f"An adapter has two matrices for a module, A and B; {self.where} has "
                f"{there.name}, and no {missing} beside it. Download or copy it again."
            )
        if not config.has(self.called, head_or_embedding=self.is_head or self.is_embedding):
            raise CheckpointError(
                f"{ADAPTER} of {self.where} gives {self.called} no adapter (target_modules and "
                f"the like), and {a.name} is there. peft would leave it out. Correct "
                "target_modules, or remove the tensor."
            )
        rank, (out, into) = config.rank_of(self.called), self.shape
        if self.is_embedding:
            out, into = into, out
        said = f"r {rank} and the model's sizes"
        self._check_shape(a, (rank, into), said)
        self._check_shape(b, (out, rank), said)
        scaling = config.scaling_of(self.called)
        return MergedTensor(base, Factors(a, b, scaling, self.is_embedding))

    def _check_shape(self, tensor: StoredTensor, shape: tuple[int, ...], said: str) -> None:
        if tensor.shape != shape:
            raise CheckpointError(
                f"The tensors in {self.where} have not the shapes that {said} give them: "
                f"{tensor.name} is {list(tensor.shape)}, expected {list(shape)}. Give an adapter "
                "that was trained on this model."
            )


def _modules(
    tensors: list[StoredTensor], incoming: Incoming, directory: Path
) -> dict[str, _Module]:
    """An adapter's tensors by the model's tensor that they change, as the table names it."""
    shapes = {slot.theirs: slot.shape for mine in incoming.slots.values() for slot in mine}
    # The head is no tensor of its own where it is the embedding; that has its own sentence.
    shapes.setdefault(HEAD, shapes[EMBED])
    rules = NameRules.of(incoming.architecture)
    modules: dict[str, _Module] = {}
    unknown = []
    for tensor in tensors:
        called, kind, part = _parsed(tensor.name)
        named, _ = rules.apply([f"{called}.weight"])
        name = next(iter(named), "")
        shape = shapes.get(name, ())
        embedding, head = name == EMBED, name == HEAD
        fits = kind is (_EMBEDDING if embedding else _LINEAR)
        fits = fits or (kind is _OWN and (embedding or head))
        module = modules.setdefault(name, _Module(called, directory, shape, embedding, head, {}))
        if len(shape) != 2 or not fits or part in module.tensors:
            unknown.append(tensor.name)
        module.tensors[part] = tensor
    if unknown:
        raise CheckpointError(
            f"An adapter has lora_A and lora_B of matrices of its model, and {directory} has "
            f"{len(unknown)} unknown tensors: {some(sorted(unknown))}. Give an adapter that was "
            f"trained on {incoming.config.name}. If this one was: {MERGE_BY_PEFT}"
        )
    return modules


def _parsed(name: str) -> tuple[str, dict[str, str] | None, str]:
    """Of a tensor's name the module, the kind of its suffix, and the part that this stands for."""
    if name.startswith(_BEFORE):
        for kind in (_LINEAR, _EMBEDDING, _OWN):
            for end, part in kind.items():
                if name.endswith(end):
                    return name.removeprefix(_BEFORE).removesuffix(end), kind, part
    return name, None, name


def _check_embedding(modules: dict[str, _Module], incoming: Incoming, directory: Path) -> None:
    """Whether no adapter changes a head that is the embedding, or the reverse."""
    changed = [modules[name].called for name in (EMBED, HEAD) if name in modules]
    if changed and incoming.config.tied_embeddings:
        raise CheckpointError(
            f"In {incoming.config.name} the head is the embedding (tie_word_embeddings), and an "
            f"adapter of one would change both; {directory} has one of {' and '.join(changed)}. "
            "Save the model with a head of its own (tie_word_embeddings false), and merge into it."
        )


def _check_all_there(modules: dict[str, _Module], incoming: Incoming, config: LoraConfig) -> None:
    """Whether every matrix that the configuration gives an adapter has one."""
    slots = [slot for mine in incoming.slots.values() for slot in mine]
    missing = [
        slot.theirs
        for slot in slots
        if len(slot.shape) == 2
        and (slot.theirs not in modules or _A not in modules[slot.theirs].tensors)
        and config.has(
            slot.theirs.removesuffix(".weight"), head_or_embedding=slot.theirs in (EMBED, HEAD)
        )
    ]
    if missing:
        raise CheckpointError(
            f"{ADAPTER} of {config.where} gives {len(missing)} modules an adapter of which "
            f"{_WEIGHTS} has none: {some(name.removesuffix('.weight') for name in missing)}. "
            "Download or copy it again."
        )
