"""How many multiplications and additions a prompt needs, counted from the model's sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ffjax.config import ModelConfig

__all__ = ["PromptFlops", "prompt_flops", "visible_pairs"]


@dataclasses.dataclass(frozen=True)
class PromptFlops:
    """Operations of a prefill: a multiplication and an addition are two.

    Attributes:
        products: of the layers' matrices, which every token multiplies.
        attention: of queries with keys and of probabilities with values, where a query sees a key.
        head: of the head, which the last token of each sequence multiplies.
    """

    products: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.products + self.attention + self.head


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, its own included.

    Args:
        length: tokens of a sequence that starts at position 0.
        window: positions that a query sees, or None for all up to its own.
    """
    seen = length if window is None else min(window, length)
    # The first `seen` queries see 1, 2, .. keys, all others as many as the window.
    return seen * (seen + 1) // 2 + (length - seen) * seen


def prompt_flops(config: ModelConfig, lengths: Sequence[int]) -> PromptFlops:
    """Operations of the prefill of prompts of these lengths; padding counts nothing.

    Norms, RoPE, softmax and the unpacking of quantized weights are left out, and so are lookups in
    the embedding. The last layer counts in full, though a prefill could leave out what only the
    last token's logits need of it.

    Args:
        config: the model's.
        lengths: tokens of each prompt.
    """
    layer = sum(out * into for name, (out, into) in config.matrices.items() if name != "head")
    pairs = sum(
        visible_pairs(length, config.window if local else None)
        for local in config.local_layers
        for length in lengths
    )
    return PromptFlops(
        products=2 * config.num_layers * layer * sum(lengths),
        attention=4 * config.num_heads * config.head_dim * pairs,
        head=2 * config.vocab_size * config.model_dim * len(lengths),
    )
