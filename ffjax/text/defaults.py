"""How a checkpoint wants its tokens chosen, where nobody says otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from checkpoints.gguf import generation_json, is_gguf, read_header
from checkpoints.manifest import HF_FILES
from checkpoints.places import model_path
from ffjax.hf_tokens import json_object
from ffjax.sampling.params import SamplingParams

__all__ = ["GENERATION_CONFIG", "default_sampling", "described"]

GENERATION_CONFIG = "generation_config.json"


def default_sampling(path: str | Path) -> SamplingParams:
    """What the `generation_config.json` of a checkpoint or Hugging Face folder asks for.

    Of a GGUF file it is what its metadata asks for.

    Args:
        path: the directory of either, or a GGUF file.

    Returns:
        Its parameters; those of greedy choices where there is no such file, or it names none.

    Raises:
        ValueError: the file is damaged, or names what cannot be.
    """
    directory = model_path(path)
    if is_gguf(directory):
        return SamplingParams.from_generation_config(generation_json(read_header(directory)))
    for file in (directory / GENERATION_CONFIG, directory / HF_FILES / GENERATION_CONFIG):
        if file.is_file():
            try:
                return SamplingParams.from_generation_config(json_object(file))
            except (TypeError, ValueError) as error:
                if str(file) in str(error):
                    raise
                raise ValueError(
                    f"{file} says how tokens are chosen, and cannot be followed: {error} "
                    "Correct the file, or remove the field."
                ) from error
    return SamplingParams()


def described(params: SamplingParams) -> str:
    """Parameters in a line, as in "temperature 0.6, top_p 0.9"; "greedy" where there are none."""
    defaults = SamplingParams()
    said = [
        f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}"
        for field in dataclasses.fields(params)
        if (value := getattr(params, field.name)) != getattr(defaults, field.name)
    ]
    if params.greedy:
        said.insert(0, "greedy")
    return ", ".join(said)
