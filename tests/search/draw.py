"""Draws what to run: a model's sizes and formats, and a cache in the midst of its life."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, cast

from stream_cases import FAMILIES

from ffjax.config import ModelConfig
from ffjax.dims import step_dims
from ffjax.formats import INT8, INT8_GROUP, Offset, ScaleType, WeightFormat, WeightFormats, int4
from pallas_kernels.dims import Dims
from pallas_kernels.stream.tuning import Tuning
from pallas_kernels.support import MAX_BATCH

__all__ = ["MATRICES", "STEPS", "Case", "draw_case"]

# Of every case, so many steps are run.
STEPS = 8
MATRICES = ("qkv", "attn_out", "gate_up", "down", "head")
# What a case says itself.
_SIZES = ("num_heads", "num_kv_heads", "num_layers", "window")
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    **{
        name: {field: value for field, value in fields.items() if field not in _SIZES}
        for name, fields in FAMILIES.items()
    },
}
_LOCAL = {name for name, fields in FAMILIES.items() if "window" in fields}
_NO_GROUPS = ("",) * len(MATRICES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and steps of it. What it prints as is Python.

    Attributes:
        family: what the model does besides Llama.
        layers, model_dim, ffw_dim, heads, kv_heads, head_dim, vocab: its sizes.
        window: of local layers, for families that have them.
        tied: whether the head is the embedding.
        bits: of the weights of `MATRICES`.
        groups: of those in int4, what is not the default, as "32 float16 zero"; of those in int8,
            whether they have groups.
        lengths: of the sequences before the first step.
        capacity: of the cache.
        step: steps that the cache has seen, perhaps of other sequences.
        tokens: of each sequence that a step takes.
        tuning: what is not the default.
        seed: of the numbers.
    """

    family: str = "llama"
    layers: int = 1
    model_dim: int = 128
    ffw_dim: int = 128
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    vocab: int = 64
    window: int | None = None
    tied: bool = False
    bits: tuple[int, ...] = (16,) * len(MATRICES)
    groups: tuple[str, ...] = _NO_GROUPS
    lengths: tuple[int, ...] = (0,)
    capacity: int = 64
    step: int = 0
    tokens: int = 1
    tuning: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def __repr__(self):
        fields = (field for field in dataclasses.fields(self))
        said = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields
            if getattr(self, field.name) != field.default
        )
        return f"Case({', '.join(said)})"

    @property
    def config(self) -> ModelConfig:
        """The model's configuration.

        Raises:
            ValueError: there can be no such model.
        """
        kinds = map(_format, self.bits, self.groups)
        formats = dict(zip(MATRICES, kinds, strict=True))
        return ModelConfig(
            name="drawn",
            num_layers=self.layers,
            model_dim=self.model_dim,
            ffw_dim=self.ffw_dim,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            window=self.window,
            tied_embeddings=self.tied,
            weights=WeightFormats(**formats),
            # Far from a rounding error, so that a kernel with another one is found out.
            norm_eps=1e-2,
            **_FAMILIES[self.family],
        )

    @property
    def dims(self) -> Dims:
        """The kernel's sizes."""
        return step_dims(self.config, len(self.lengths), self.capacity, self.tokens)

    @property
    def tuned(self) -> Tuning | None:
        """The tuning; None where it is what the table says."""
        return Tuning(**dict(self.tuning)) if self.tuning else None

    @property
    def formats(self) -> str:
        """The formats in a word or two, for a summary."""
        layers, head = set(self.bits[:-1]), self.bits[-1]
        if len(layers) > 1:
            return "mixed"
        name = {16: "bfloat16", 8: "int8", 4: "int4"}
        body = name[layers.pop()]
        if any(self.groups):
            return f"{body}, groups"
        return body if name[head] in (body, "bfloat16") else f"{body}, head {name[head]}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """What `to_json` made plain data of, even if lists have taken the place of tuples."""
        made = dict(data)
        for name in ("bits", "groups", "lengths"):
            made[name] = tuple(made[name])
        made["tuning"] = tuple((name, value) for name, value in made["tuning"])
        return cls(**made)


def draw_case(seed: int, cores: int = 132) -> Case:
    """The case of a seed.

    Args:
        seed: of it; the same gives the same.
        cores: multiprocessors of the GPU: their multiples decide who has a tile.
    """
    draw = random.Random(seed)
    while True:
        case = _drawn(draw, seed, cores)
        if _bytes(case) > _most_bytes(draw):
            continue
        try:
            _ = case.config
        except ValueError:
            continue
        case = dataclasses.replace(case, tokens=_tokens(seed, len(case.lengths)))
        grouped = dataclasses.replace(case, groups=_groups(seed, case.bits))
        try:
            _ = grouped.config
        except ValueError:  # its rows are no whole groups
            return case
        return grouped


def _format(bits: int, groups: str) -> WeightFormat | None:
    """How a matrix is stored."""
    if bits == 16:
        return None
    if not groups:
        return INT8 if bits == 8 else int4()
    size, scales, *offset = groups.split()
    kept = cast(ScaleType, scales)
    if bits == 8:
        return WeightFormat(bits=8, group_size=INT8_GROUP, scale_dtype=kept)
    return int4(int(size), kept, cast(Offset, offset[0]) if offset else None)


def _groups(seed: int, bits: tuple[int, ...]) -> tuple[str, ...]:
    """Of each matrix, by a draw of their own; often the same of all."""
    draw = random.Random(seed ^ 0x6A0095)
    if bits == (16,) * len(bits) or draw.random() < 0.5:
        return _NO_GROUPS

    def one() -> str:
        size, scales = draw.choice((32, 32, 64, 128)), draw.choice(("bfloat16", "float16"))
        return f"{size} {scales} {draw.choice(('', 'zero', 'minimum'))}".strip()

    if draw.random() < 0.5:
        return (one(),) * len(bits)
    return tuple(draw.choice(("", one())) for _ in bits)


def _tokens(seed: int, batch: int) -> int:
    """Of each sequence, by a draw of their own: the rest of a seed's case does not hang on it."""
    draw = random.Random(seed ^ 0x70CE25)
    most = MAX_BATCH // batch
    return draw.randint(2, most) if most > 1 and draw.random() < 0.6 else 1


def _most_bytes(draw: random.Random) -> float:
    """Of weights: so that a case costs little, but now and then more."""
    return 2e9 if draw.random() < 0.02 else 3e8 if draw.random() < 0.2 else 1e8


def _bytes(case: Case) -> float:
    """Of weights and embedding."""
    heads = case.heads + 2 * case.kv_heads
    sizes = {
        "qkv": case.layers * heads * case.head_dim * case.model_dim,
        "attn_out": case.layers * case.heads * case.head_dim * case.model_dim,
        "gate_up": 2 * case.layers * case.ffw_dim * case.model_dim,
        "down": case.layers * case.ffw_dim * case.model_dim,
        "head": case.vocab * case.model_dim,
    }
    read = sum(sizes[name] * bits / 8 for name, bits in zip(MATRICES, case.bits, strict=True))
    return read + 2 * case.vocab * case.model_dim


def _drawn(draw: random.Random, seed: int, cores: int) -> Case:
    family = draw.choice(list(_FAMILIES))
    bits = _bits(draw)
    grain = 128 if 4 in bits else 16
    tied = bits[-1] == 16 and draw.random() < 0.3
    head_dim = draw.choice((32, 64, 64, 128, 128, 256))
    group = draw.choice((1, 1, 2, 3, 4, 4, 5, 7, 8, 9, 12, 16))
    kv_heads = draw.randint(1, max(1, min(64 // group, draw.choice((2, 4, 8, 64)))))
    heads = group * kv_heads
    layers = draw.choice((1, 2, 3, 4, 5, 8, 9, 12, 16, 24, 30, 40, draw.randint(1, 40)))
    batch = draw.choice((1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 8))
    # Of several sequences, threads hold rows of more than 4096 otherwise: they are drawn at times.
    widest = 8192 if batch == 1 or random.Random(seed ^ 0x71DE).random() < 0.25 else 4096
    model_dim = _width(draw, 128, widest, grain, cores)
    ffw_dim = _width(draw, 64, 6 * model_dim, grain, cores)
    vocab = _vocab(draw, cores)
    window = draw.choice((1, 2, 16, 40, 100, 255, 256, 300)) if family in _LOCAL else None
    capacity = _capacity(draw, layers * batch * kv_heads * head_dim)
    return Case(
        family=family,
        layers=layers,
        model_dim=model_dim,
        ffw_dim=ffw_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        window=window,
        tied=tied,
        bits=bits,
        lengths=tuple(_length(draw, capacity, window) for _ in range(batch)),
        capacity=capacity,
        step=_step(draw, layers),
        tuning=_tuning(draw),
        seed=seed,
    )


def _bits(draw: random.Random) -> tuple[int, ...]:
    """Of each matrix."""
    if draw.random() < 0.2:
        return tuple(draw.choice((16, 8, 4)) for _ in MATRICES)
    layers = draw.choice((16, 8, 4))
    head = draw.choice((layers, layers, 16, 8))
    return (layers,) * 4 + (head,)


def _width(draw: random.Random, least: int, most: int, grain: int, cores: int) -> int:
    """A width: often one at which the last program gets, or does not get, another tile."""
    if draw.random() < 0.5:
        rows = draw.choice((1, 2, 4, 8, 16))
        number = cores * rows * draw.randint(1, max(1, most // (cores * rows)))
        number += draw.choice((-1, 0, 1)) * grain
    else:
        number = round(least * (most / least) ** draw.random())
    coarse = draw.choice((grain, grain, max(grain, 64), max(grain, 256)))
    whole = max(1, round(number / coarse)) * coarse
    return min(max(whole, grain * -(-least // grain)), most // grain * grain)


def _vocab(draw: random.Random, cores: int) -> int:
    if draw.random() < 0.4:
        rows = draw.choice((2, 4, 8, 16))
        return max(8, cores * rows * draw.randint(1, 4) + draw.choice((-rows, -1, 0, 1)))
    most = draw.choice((40, 300, 2000, 2000, 8000, 50_000))
    number = draw.randint(8, most)
    return number | 1 if draw.random() < 0.5 else 64 * -(-number // 64)


def _capacity(draw: random.Random, position: int) -> int:
    """Slots of the cache: few enough that keys and values take little."""
    number = draw.choice((9, 40, 64, 150, 256, 300, 520, 1024, 2100, 8200))
    number += draw.choice((0, 0, 0, 1, 7))
    return max(9, min(number, int(3e7) // (4 * position)))


def _length(draw: random.Random, capacity: int, window: int | None) -> int:
    """Of a sequence: around the edges of tiles, KV splits, the window, and the cache."""
    edges = [0, 1, 16, 32, 64, 128, 256, 512, 1024, capacity - STEPS, capacity - 1, capacity]
    if window is not None:
        edges += [window, window, window + 256]
    number = draw.choice(edges) + draw.choice((-9, -8, -1, 0, 0, 1))
    if draw.random() < 0.3:
        number = draw.randint(0, capacity)
    return min(max(number, 0), capacity)


def _step(draw: random.Random, layers: int) -> int:
    """Steps that the cache has seen: around those where numbers or tags wrap."""
    tags = layers + 1
    edges = (0, 0, 1, 84, 1000, 2**29, 2**31 - 1, 2**32 // tags, 2**31 // tags)
    return max(0, min(draw.choice(edges) - draw.choice((0, 1, 3, 7)), 2**31 - 1))


def _tuning(draw: random.Random) -> tuple[tuple[str, Any], ...]:
    if draw.random() < 0.75:
        return ()
    choices: dict[str, tuple[Any, ...]] = {
        "tile_bytes": (8192, 16384, 32768, 65536),
        "num_warps": (4, 8),
        "slots": (2, 3, 16),
        "in_flight": (1, 2, 3, 16),
        "l2_tiles": (0, 4, 16),
        "l2_bytes": (4096, 65536),
        "next_tiles": (1, 2, 16),
        "collect_tiles": (1, 2, 4),
        "hidden_copies": (2,),
        "cache_tile_bytes": (16384,),
        "cache_tiles": (2, 3, 6),
    }
    names = draw.sample(sorted(choices), draw.randint(1, 3))
    return tuple((name, draw.choice(choices[name])) for name in names)
