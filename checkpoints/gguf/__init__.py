"""GGUF files in: weights, configuration, tokenizer and chat template of one file.

`header` reads what a file says of itself, `tensors` its numbers; `names` has its names of tensors.
`config` makes of the metadata the config.json that Hugging Face would write, with `ropes` and
`windows`. `tokenizer` makes the files of a Hugging Face tokenizer, with `vocabulary`, `byte_level`,
`splits` and `sentencepiece`. `file` puts them together: from there on a GGUF file is treated as a
Hugging Face folder is.
"""

from checkpoints.gguf.file import GGUFFile, convert_gguf, is_gguf, write_tokenizer
from checkpoints.gguf.header import read_header
from checkpoints.gguf.tokenizer import generation_json

__all__ = [
    "GGUFFile",
    "convert_gguf",
    "generation_json",
    "is_gguf",
    "read_header",
    "write_tokenizer",
]
