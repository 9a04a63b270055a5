"""The tokenizer that lies with a model."""

from __future__ import annotations

from pathlib import Path

from checkpoints import tokenizer_at
from ffjax.config import ModelConfig
from ffjax.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["load_tokenizer"]


def load_tokenizer(path: str | Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model: the one that lies with its weights, else bytes.

    It may have tokens beyond those that the model knows, as Gemma 3's has one for images: a
    prompt that holds one is refused, and nothing else.

    Args:
        path: the directory of a checkpoint or of a Hugging Face model, or a GGUF file.
        config: the model's configuration.

    Returns:
        A tokenizer with `encode`, `decode` and `eot_ids`, those of the tokens that end a text; one
        of a Hugging Face folder or a GGUF file can `chat`, too.

    Raises:
        ValueError: there is none, and the model's tokens are not bytes; or it is damaged, or
            names no token that ends a text.
        NotImplementedError: the extra `hf` is not installed.
    """
    with tokenizer_at(path) as directory:
        if directory is not None:
            # Where tokens are bytes, nobody waits for its import.
            from ffjax.hf_tokenizer import HFTokenizer

            return HFTokenizer.read(directory, rows=config.vocab_size)
        if config.vocab_size != ByteTokenizer.vocab_size:
            raise ValueError(
                f"Where no tokenizer.json lies with a model, its tokens are bytes: it needs a "
                f"vocabulary of {ByteTokenizer.vocab_size}; {config.name} has "
                f"{config.vocab_size}. Put its tokenizer.json beside its config.json, and convert "
                "it again (in Python, ffjax.save takes tokenizer_from)."
            )
        return ByteTokenizer()
