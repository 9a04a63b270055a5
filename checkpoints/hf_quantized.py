"""Which reader a Hugging Face folder's quantized matrices have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.hf_awq import read_awq
from checkpoints.hf_compressed import read_compressed
from checkpoints.hf_files import StoredTensor
from checkpoints.hf_fp8 import read_fp8
from checkpoints.hf_gptq import read_gptq
from checkpoints.hf_integers import Reader, Settings, raw
from checkpoints.hf_table import Slot
from checkpoints.integers import IntegerMatrix
from checkpoints.manifest import CheckpointError

__all__ = ["QUANTIZATION", "drop_empty_biases", "take_matrices", "taken_settings"]

QUANTIZATION = "quantization_config"

_READERS: dict[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "fp8": read_fp8,
}


def taken_settings(data: dict[str, Any], where: Path, *, integers: bool) -> Settings | None:
    """What quantized a model, taken out of its config.json; None: nothing that has a reader.

    What has none stays there, and is refused with the other fields that are not supported.

    Args:
        data: of config.json.
        where: the folder.
        integers: whether integers are wanted.
    """
    fields = data.get(QUANTIZATION)
    if not isinstance(fields, dict) or fields.get("quant_method") not in _READERS:
        return None
    del data[QUANTIZATION]
    return Settings(where, fields, integers)


def drop_empty_biases(
    tensors: dict[str, StoredTensor], slots: Mapping[str, list[Slot]]
) -> list[str]:
    """Takes out biases of zeros that the model has no place for: some quantizers write them.

    Args:
        tensors: by the names in the table.
        slots: the places that there are.

    Returns:
        The names of those that were taken out.
    """
    wanted = {slot.theirs for mine in slots.values() for slot in mine}
    beyond = [name for name in tensors if name.endswith(".bias") and name not in wanted]
    empty = [name for name in beyond if not raw(tensors[name]).any()]
    return [tensors.pop(name).name for name in empty]


def take_matrices(
    settings: Settings | None, tensors: dict[str, StoredTensor]
) -> dict[str, IntegerMatrix]:
    """Takes the tensors of quantized matrices out of a model's.

    Args:
        settings: what quantized it, if anything.
        tensors: by the names in the table; what is no matrix stays.

    Returns:
        The matrices of integers, by their names in the table.

    Raises:
        CheckpointError: their layout is not supported, or they are damaged; or there are none.
    """
    if settings is None:
        return {}
    before = dict(tensors)
    matrices = _READERS[settings.fields["quant_method"]](settings, tensors)
    if not matrices and tensors == before:
        raise CheckpointError(
            f"{QUANTIZATION} of {settings.where} names "
            f"{settings.fields['quant_method']!r}, and there are no such matrices. Download the "
            "model again."
        )
    return matrices
