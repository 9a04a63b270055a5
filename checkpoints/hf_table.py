"""Which Hugging Face tensor is which part of which of our arrays: a table for each family.

The tables are data, read forwards by the import and backwards by the export.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from checkpoints.manifest import CheckpointError
from ffjax.config import ModelConfig

__all__ = ["EMBED", "HEAD", "TABLES", "Entry", "NameRules", "Slot", "slots_of"]

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


# Arrays whose rows are heads' elements, of queries, keys and values in turn.
_ROTATED = ("layers.qkv", "layers.qkv_bias")


class Entry(NamedTuple):
    """A line of a table.

    Attributes:
        theirs: the tensor's name; `{i}` stands for the layer.
        ours: the dotted name of our array. Entries of one array follow each other in the
            order of its rows.
        rows: how many of the array's rows the tensor fills, a key of `_row_counts`; None,
            all. No tensor is transposed: both sides keep matrices as [out, in].
    """

    theirs: str
    ours: str
    rows: str | None = None


class Slot(NamedTuple):
    """The place of one tensor within one of our arrays.

    Attributes:
        theirs: the tensor's name.
        ours: the dotted name of the array.
        place: what of the array the tensor is: `array[place]`.
        shape: the tensor's shape.
        order: which of the tensor's rows each row of the place is; None: they are in our order.
    """

    theirs: str
    ours: str
    place: tuple[int | slice, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None


def _layer(*lines: tuple[str, str] | tuple[str, str, str]) -> tuple[Entry, ...]:
    return tuple(
        Entry(f"model.layers.{{i}}.{theirs}", f"layers.{ours}", *rows)
        for theirs, ours, *rows in lines
    )


_BEYOND_LAYERS = (
    Entry(EMBED, "embed"),
    Entry("model.norm.weight", "final_norm"),
    Entry(HEAD, "head"),
)

_PROJECTIONS = _layer(
    ("self_attn.q_proj.weight", "qkv", "N*H"),
    ("self_attn.k_proj.weight", "qkv", "K*H"),
    ("self_attn.v_proj.weight", "qkv", "K*H"),
    ("self_attn.o_proj.weight", "attn_out"),
    ("mlp.gate_proj.weight", "gate_up", "F"),
    ("mlp.up_proj.weight", "gate_up", "F"),
    ("mlp.down_proj.weight", "down"),
)

# Their rows are in our order.
_FUSED_PROJECTIONS = _layer(
    ("self_attn.qkv_proj.weight", "qkv"),
    ("self_attn.o_proj.weight", "attn_out"),
    ("mlp.gate_up_proj.weight", "gate_up"),
    ("mlp.down_proj.weight", "down"),
)

_EVERY_FAMILY = (*_BEYOND_LAYERS, *_PROJECTIONS)

_NORMS_BEFORE = _layer(
    ("input_layernorm.weight", "attn_norm"),
    # The name is misleading: it comes after attention, before the feed-forward block.
    ("post_attention_layernorm.weight", "mlp_norm"),
)

_NORMS_BEHIND = _layer(
    ("post_attention_layernorm.weight", "attn_post_norm"),
    ("post_feedforward_layernorm.weight", "mlp_post_norm"),
)

_NORMS_BEFORE_AND_BEHIND = (
    *_layer(
        ("input_layernorm.weight", "attn_norm"),
        ("pre_feedforward_layernorm.weight", "mlp_norm"),
    ),
    *_NORMS_BEHIND,
)

_QKV_BIAS = _layer(
    ("self_attn.q_proj.bias", "qkv_bias", "N*H"),
    ("self_attn.k_proj.bias", "qkv_bias", "K*H"),
    ("self_attn.v_proj.bias", "qkv_bias", "K*H"),
)

_OTHER_BIASES = _layer(
    ("self_attn.o_proj.bias", "attn_out_bias"),
    ("mlp.gate_proj.bias", "gate_up_bias", "F"),
    ("mlp.up_proj.bias", "gate_up_bias", "F"),
    ("mlp.down_proj.bias", "down_bias"),
)

# A weight for one head, or one for all heads at once: `ModelConfig.qk_norm` says which.
_QK_NORMS = _layer(
    ("self_attn.q_norm.weight", "q_norm"),
    ("self_attn.k_norm.weight", "k_norm"),
)

TABLES: dict[str, tuple[Entry, ...]] = {
    "llama": (*_EVERY_FAMILY, *_NORMS_BEFORE, *_QKV_BIAS, *_OTHER_BIASES),
    "mistral": (*_EVERY_FAMILY, *_NORMS_BEFORE),
    "qwen2": (*_EVERY_FAMILY, *_NORMS_BEFORE, *_QKV_BIAS),
    "qwen3": (*_EVERY_FAMILY, *_NORMS_BEFORE, *_QK_NORMS),
    "olmo2": (*_EVERY_FAMILY, *_NORMS_BEHIND, *_QK_NORMS),
    "olmo3": (*_EVERY_FAMILY, *_NORMS_BEHIND, *_QK_NORMS),
    "granite": (*_EVERY_FAMILY, *_NORMS_BEFORE, *_QKV_BIAS, *_OTHER_BIASES),
    "gemma2": (*_EVERY_FAMILY, *_NORMS_BEFORE_AND_BEHIND),
    "gemma3": (*_EVERY_FAMILY, *_NORMS_BEFORE_AND_BEHIND, *_QK_NORMS),
    "smollm3": (*_EVERY_FAMILY, *_NORMS_BEFORE, *_QKV_BIAS, *_OTHER_BIASES),
    "phi3": (*_BEYOND_LAYERS, *_FUSED_PROJECTIONS, *_NORMS_BEFORE),
}


class NameRules(NamedTuple):
    """What an architecture calls its tensors, where not as the table does.

    Attributes:
        prefixes: beginnings of names and what the table has in their place.
        left_out: patterns of tensors that the model of the table has no use for.
    """

    prefixes: Mapping[str, str]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, architecture: str) -> NameRules:
        """The rules of an architecture."""
        return _RULES.get(architecture, _PLAIN)

    def apply(self, names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
        """Sorts a checkpoint's names.

        Returns:
            By each name as the table has it, the names in the checkpoint that stand for it
            (more than one: a duplicate); and the names that are left out.
        """
        named: dict[str, list[str]] = {}
        left_out = []
        for name in names:
            if any(re.search(pattern, name) for pattern in self.left_out):
                left_out.append(name)
                continue
            ours = name
            for start, instead in self.prefixes.items():
                if name.startswith(start):
                    ours = instead + name.removeprefix(start)
                    break
            named.setdefault(ours, []).append(name)
        return named, left_out


# Buffers that old releases keep, and that no model of these families has: RoPE's frequencies and
# tables, which the configuration gives, and attention's mask.
_BUFFERS = (
    r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    r"\.(self_)?attn\.(bias|masked_bias)$",
)

_PLAIN = NameRules({}, _BUFFERS)

_RULES = {
    # The text model within a model that also sees. transformers 4 and 5 name it differently.
    "Gemma3ForConditionalGeneration": NameRules(
        {"model.language_model.": "model.", "language_model.": ""},
        (*_BUFFERS, r"^(model\.)?(vision_tower|multi_modal_projector)\."),
    ),
}


def _rotated_order(config: ModelConfig, start: int, count: int) -> tuple[int, ...] | None:
    """The order of rows of the fused projection, from one on, where parts of heads are rotated.

    Theirs has the R rotated elements of a head first, of which i and i + R/2 are a pair, then the
    others. Ours pairs i with i + H/2 for all: the first R/2 of each half are the rotated ones.
    """
    if (pairs := config.rotary_pairs) is None:
        return None
    size, rest = config.head_dim, config.head_dim // 2 - config.rotary_pairs
    first, second = range(pairs), range(pairs, 2 * pairs)
    still = range(2 * pairs, size)
    head = (*first, *still[:rest], *second, *still[rest:])
    rotated = (config.num_heads + config.num_kv_heads) * size

    def of(row: int) -> int:
        return row if row >= rotated else row // size * size + head[row % size]

    return tuple(of(row) - start for row in range(start, start + count))


def _row_counts(config: ModelConfig) -> dict[str, int]:
    return {
        "N*H": config.num_heads * config.head_dim,
        "K*H": config.num_kv_heads * config.head_dim,
        "F": config.ffw_dim,
    }


def slots_of(config: ModelConfig, shapes: Mapping[str, Any]) -> dict[str, list[Slot]]:
    """The places of all tensors of a model, by our array, in the order of its rows.

    Args:
        config: the configuration; its family picks the table.
        shapes: our arrays by dotted name, each with a `shape`.

    Raises:
        CheckpointError: there is no table of the family, or none of its tensors fits an
            array that the configuration asks for.
    """
    if (table := TABLES.get(config.family)) is None:
        raise CheckpointError(
            f"Hugging Face checkpoints are of the families {', '.join(TABLES)}; "
            f"{config.name} is of the family {config.family!r}."
        )
    counts = _row_counts(config)
    entries: dict[str, list[Entry]] = {name: [] for name in shapes}
    for entry in table:
        if entry.ours in entries:  # the head is no array of its own where it is the embedding
            entries[entry.ours].append(entry)
    slots: dict[str, list[Slot]] = {}
    for name, mine in entries.items():
        if not mine:
            raise CheckpointError(
                f"Hugging Face's models of the family {config.family!r} have no {name}, and the "
                f"configuration of {config.name} asks for it."
            )
        shape, stacked = shapes[name].shape, "{i}" in mine[0].theirs
        inner = shape[1:] if stacked else shape
        rows = [inner[0] if entry.rows is None else counts[entry.rows] for entry in mine]
        assert sum(rows) == inner[0], f"The table's rows of {name} are {rows}, of {inner[0]}."
        starts = [sum(rows[:k]) for k in range(len(rows))]
        slots[name] = [
            Slot(
                theirs=entry.theirs.format(i=i),
                ours=name,
                place=(i, slice(start, start + count))
                if stacked
                else (slice(start, start + count),),
                shape=(count, *inner[1:]),
                order=_rotated_order(config, start, count) if name in _ROTATED else None,
            )
            for i in range(shape[0] if stacked else 1)
            for entry, start, count in zip(mine, starts, rows, strict=True)
        ]
    return slots
