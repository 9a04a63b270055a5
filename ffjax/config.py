"""Model configuration: the sizes and constants of a decoder-only transformer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from ffjax.formats import FLOATING, WeightFormats
from ffjax.presets import RELEASED

__all__ = [
    "PRESETS",
    "Activation",
    "AnyRopeScaling",
    "LinearRopeScaling",
    "LongRopeScaling",
    "ModelConfig",
    "QkNorm",
    "RopeScaling",
    "YarnRopeScaling",
    "preset",
]

Activation = Literal["silu", "gelu_tanh"]
QkNorm = Literal["head", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of RoPE to contexts longer than those of pretraining.

    Wavelengths longer than `original_context / low_freq_factor` positions are
    stretched by `factor`; those shorter than `original_context /
    high_freq_factor` are kept; those between are interpolated. Source: the
    Llama 3.1 release, `rope_scaling` of type "llama3" in its configuration.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(
                f"RoPE scaling stretches: factor must be at least 1, got {self.factor}."
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "RoPE scaling needs 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )
        if self.original_context < 1:
            raise ValueError(
                f"RoPE scaling needs a positive original_context, got {self.original_context}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeScaling:
    """Position interpolation (Chen et al., arXiv 2306.15595): every wavelength `factor` as long.

    Gemma 3's larger models stretch their global layers so.
    """

    factor: float

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(
                f"RoPE scaling stretches: factor must be at least 1, got {self.factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRopeScaling:
    """YaRN (Peng et al., arXiv 2309.00071): long waves are stretched, short ones kept.

    Waves that turn `beta_fast` times or more in the original context are kept, those that turn
    `beta_slow` times or less are `factor` as long. Between those two, by the number of the pair,
    frequencies are interpolated (its section 3.2, in transformers' form).

    Attributes:
        factor: how much longer the longest waves become.
        original_context: positions of pretraining.
        beta_fast: turns in the original context from which on a wave is kept.
        beta_slow: turns up to which it is stretched in full.
        truncate: whether these two bounds are rounded outwards to whole pairs.
        attention_factor: multiplies cosines and sines (its section 3.4).
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(
                f"RoPE scaling stretches: factor must be at least 1, got {self.factor}."
            )
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"YaRN needs 0 < beta_slow <= beta_fast, got {self.beta_slow} and {self.beta_fast}."
            )
        _check_original(self.original_context, self.attention_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., arXiv 2402.13753): each wave has a factor of its own, from a search.

    There are two sets. A cache says which: one of at most `original_context` slots takes
    `short_factors`, a larger one `long_factors`. transformers looks at the length that a text has
    so far, so both agree where the whole text fits the original context, or does not; of a text
    that outgrows it transformers computes all keys anew.

    Attributes:
        short_factors: how much longer each rotated pair's wave becomes, from the shortest on.
        long_factors: the same beyond the original context.
        original_context: positions of pretraining.
        attention_factor: multiplies cosines and sines, whichever set is taken.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context: int
    attention_factor: float = 1.0

    def __post_init__(self):
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            good = isinstance(factors, tuple) and all(map(_positive, factors))
            if not good or not factors:
                raise ValueError(
                    f"LongRoPE needs {name} that are a tuple of positive numbers, got {factors!r}."
                )
        if len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                "LongRoPE needs as many short_factors as long_factors, got "
                f"{len(self.short_factors)} and {len(self.long_factors)}."
            )
        _check_original(self.original_context, self.attention_factor)


def _check_original(original_context: Any, attention_factor: Any) -> None:
    if type(original_context) is not int or original_context < 1:
        raise ValueError(
            f"RoPE scaling needs a positive original_context, got {original_context!r}."
        )
    if not _positive(attention_factor):
        raise ValueError(
            f"RoPE scaling needs a positive attention_factor, got {attention_factor!r}."
        )


AnyRopeScaling = RopeScaling | LinearRopeScaling | YarnRopeScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a model. The letters are those of every shape in ffjax.

    What is left at its default makes a model of the Llama family.

    Attributes:
        name: what the model is called in messages.
        family: the family it belongs to, a label for reports and for export: "llama",
            "mistral", "qwen2", "qwen3", "olmo2", "granite", "gemma2", "gemma3", "phi3". No
            number depends on it.
        vocab_size: V, rows of the embedding and of the head.
        num_layers: L.
        model_dim: D, the width of the residual stream.
        ffw_dim: F, the width of the feed-forward block.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of K, G = N / K.
        head_dim: H, the size of one head.
        rope_theta: base of the rotary frequencies.
        rope_theta_local: that base in local layers, which are then not stretched; None: all
            layers rotate alike.
        rope_scaling: how the frequencies are stretched, or None.
        rotary_pairs: how many of a head's H/2 pairs of elements (i, i + H/2) are rotated, the
            first ones; None: all.
        rope_pattern: which layers rotate queries and keys, repeated over the layers; the others
            know no positions (Yang et al., arXiv 2501.18795).
        norm_eps: added to the mean square inside every RMSNorm.
        norm_offset: added to the weights of every RMSNorm (Gemma: 1).
        pre_norm: whether a block (attention, feed-forward) reads the normed stream.
        post_norm: whether a block's output is normed before it is added to the stream.
        qk_norm: RMSNorm of queries and keys, before RoPE: "head", each head by itself (one
            weight for all); "full", the whole projection at once; None, none.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        attn_out_bias: whether the projection of attention's output has one.
        mlp_bias: whether the three projections of the feed-forward block have one.
        activation: of the feed-forward gate: "silu", or "gelu_tanh", GELU by its tanh formula.
        embed_scale: multiplies the embedding of a token, rounded to the weights' dtype.
        residual_scale: multiplies a block's output before it is added to the stream.
        attn_scale: multiplies the products of queries and keys; None: 1/sqrt(H).
        logit_scale: multiplies the logits.
        attn_softcap: c, which makes attention scores c * tanh(score / c); None: no cap.
        logit_softcap: the same of the logits, after logit_scale.
        window: positions that a query of a local layer sees, its own included; None: all.
        window_pattern: which layers are local where there is a window, repeated over the layers.
        tied_embeddings: whether the head is the embedding itself.
        max_context: positions the model was made for; a cache may be shorter.
        weights: which matrices are stored as integers with scales, and how; by default none.
    """

    name: str = "custom"
    family: str = "llama"
    vocab_size: int
    num_layers: int
    model_dim: int
    ffw_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_theta_local: float | None = None
    rope_scaling: AnyRopeScaling | None = None
    rotary_pairs: int | None = None
    rope_pattern: tuple[bool, ...] = (True,)
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: QkNorm | None = None
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attn_scale: float | None = None
    logit_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    tied_embeddings: bool = False
    max_context: int = 8192
    weights: WeightFormats = FLOATING

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"ModelConfig.{field.name} must be a positive integer, got {value!r}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "Every key/value head serves the same number of query heads: num_heads must be "
                f"a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs: head_dim must be even, got {self.head_dim}.")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(
                "rope_theta and norm_eps must be positive, got "
                f"{self.rope_theta} and {self.norm_eps}."
            )
        self._check_family_fields()
        self._check_weights()

    def _check_family_fields(self) -> None:
        """Raises a sentence for what no model can be made of."""

        def refuse(name: str, rule: str) -> None:
            raise ValueError(f"ModelConfig.{name} must be {rule}, got {getattr(self, name)!r}.")

        flags = ("pre_norm", "post_norm", "qkv_bias", "attn_out_bias", "mlp_bias")
        for name in (*flags, "tied_embeddings"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "true or false")
        for name, choices in (("qk_norm", QkNorm), ("activation", Activation)):
            value, names = getattr(self, name), get_args(choices)
            if value not in names and not (name == "qk_norm" and value is None):
                refuse(name, f"one of {', '.join(map(repr, names))}")
        for name in ("embed_scale", "residual_scale", "logit_scale"):
            if not _positive(getattr(self, name)):
                refuse(name, "a positive number")
        for name in ("attn_scale", "attn_softcap", "logit_softcap", "rope_theta_local"):
            if getattr(self, name) is not None and not _positive(getattr(self, name)):
                refuse(name, "a positive number or None")
        if not (_is_number(self.norm_offset) and math.isfinite(self.norm_offset)):
            refuse("norm_offset", "a finite number")
        window, pattern = self.window, self.window_pattern
        if window is not None and (type(window) is not int or window < 1):
            refuse("window", "a positive integer or None")
        for name in ("window_pattern", "rope_pattern"):
            flags = getattr(self, name)
            if not isinstance(flags, tuple) or not flags or {type(x) for x in flags} != {bool}:
                refuse(name, "a tuple of one or more booleans")
        pairs = self.rotary_pairs
        if pairs is not None and (type(pairs) is not int or not 0 < pairs < self.head_dim // 2):
            refuse("rotary_pairs", f"None, or 1 to {self.head_dim // 2 - 1}")
        if not (self.pre_norm or self.post_norm):
            raise ValueError(
                "A block is normed before it or after it, or both: pre_norm and post_norm are "
                "both false."
            )
        if window is None and any(pattern) and not all(pattern):
            raise ValueError(
                f"window_pattern {pattern} tells local layers from others: it needs a window."
            )
        if self.rope_theta_local is not None and not any(self.local_layers):
            raise ValueError(
                f"rope_theta_local={self.rope_theta_local} is for local layers: it needs a window "
                "and a window_pattern that makes one of the layers local."
            )
        if self.rope_theta_local is not None and not all(self.rotating_layers):
            raise ValueError(
                f"Layers rotate in two ways at most: rope_theta_local={self.rope_theta_local} and "
                f"a rope_pattern {self.rope_pattern} make three. Leave out one of them."
            )
        if isinstance(scaling := self.rope_scaling, LongRopeScaling):
            rotated = self.head_dim // 2 if pairs is None else pairs
            if len(scaling.short_factors) != rotated:
                raise ValueError(
                    f"LongRoPE has a factor for each rotated pair of a head, here {rotated}; "
                    f"rope_scaling has {len(scaling.short_factors)}."
                )

    def _check_weights(self) -> None:
        """Raises a sentence for formats that the matrices cannot have."""
        if not isinstance(self.weights, WeightFormats):
            raise ValueError(f"ModelConfig.weights must be a WeightFormats, got {self.weights!r}.")
        if self.tied_embeddings and self.weights.head is not None:
            raise ValueError(
                "A tied head is the embedding, which is not quantized: weights.head must be None "
                f"where tied_embeddings is true, got {self.weights.head}. ffjax.quantize with "
                "head= makes a model whose head is an array of its own."
            )
        for name, value in self.weights.quantized.items():
            others = [self.matrices[other][1] for other in self.weights.quantized]
            if (reason := value.why_not(self.matrices[name][1], *others)) is not None:
                raise ValueError(f"The matrix {name} of {self.name} cannot be {value}. {reason}")

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """[out, in] of the matrices that may be quantized, by name; a tied head is none."""
        attn_dim = self.num_heads * self.head_dim
        head = {} if self.tied_embeddings else {"head": (self.vocab_size, self.model_dim)}
        return {
            "qkv": (attn_dim + 2 * self.num_kv_heads * self.head_dim, self.model_dim),
            "attn_out": (self.model_dim, attn_dim),
            "gate_up": (2 * self.ffw_dim, self.model_dim),
            "down": (self.model_dim, self.ffw_dim),
            **head,
        }

    @property
    def biased(self) -> frozenset[str]:
        """Names of the layers' matrices whose products have a bias added."""
        mlp = ("gate_up", "down") if self.mlp_bias else ()
        attn = ("qkv",) * self.qkv_bias + ("attn_out",) * self.attn_out_bias
        return frozenset((*attn, *mlp))

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each of the L layers, whether it is local: sees no further back than `window`."""
        pattern = self.window_pattern if self.window is not None else (False,)
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def rotating_layers(self) -> tuple[bool, ...]:
        """For each of the L layers, whether it rotates queries and keys by their positions."""
        pattern = self.rope_pattern
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def other_rope_layers(self) -> tuple[bool, ...]:
        """For each of the L layers, whether its rotation differs from that of most layers.

        Local layers may have a base of their own, and layers that do not rotate have angles of 0.
        """
        if self.rope_theta_local is not None:
            return self.local_layers
        return tuple(not rotates for rotates in self.rotating_layers)

    @property
    def q_per_kv(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_params(self) -> int:
        """Number of weights; a tied head counts once, scales of quantized weights do not."""
        heads = self.num_heads + self.num_kv_heads  # of queries and of keys
        qkv = (heads + self.num_kv_heads) * self.head_dim
        qk_norms = {None: 0, "head": 2 * self.head_dim, "full": heads * self.head_dim}
        layer = (
            self.model_dim * (qkv + self.num_heads * self.head_dim)
            + 3 * self.model_dim * self.ffw_dim
            + 2 * (self.pre_norm + self.post_norm) * self.model_dim
            + qk_norms[self.qk_norm]
            + sum(self.matrices[name][0] for name in self.biased)
        )
        tables = 1 if self.tied_embeddings else 2
        vocab = tables * self.vocab_size * self.model_dim
        return self.num_layers * layer + vocab + self.model_dim

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON-able data; `from_dict` is its inverse."""
        return dataclasses.asdict(self) | {"weights": self.weights.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Builds a configuration from `to_dict`'s data.

        Args:
            data: fields by name, as JSON has them.

        Returns:
            An equal configuration.

        Raises:
            ValueError: a field is unknown or missing, or a size is impossible.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"A model configuration has no field {', '.join(unknown)}; "
                f"its fields are {', '.join(sorted(known))}."
            )
        if missing := sorted(required - set(data)):
            raise ValueError(f"A model configuration needs {', '.join(missing)}.")
        made = dict(data)
        if (scaling := data.get("rope_scaling")) is not None:
            made["rope_scaling"] = _rope_scaling(scaling)
        for name in ("window_pattern", "rope_pattern"):
            if isinstance(pattern := data.get(name), list):  # JSON has no tuples
                made[name] = tuple(pattern)
        if "weights" in data:
            made["weights"] = WeightFormats.from_dict(data["weights"])
        return cls(**made)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _rope_scaling(data: Any) -> AnyRopeScaling:
    """The scaling whose fields the table has: no two kinds share all of theirs."""
    if not isinstance(data, dict):
        raise ValueError(f"rope_scaling is a table of fields or null, got {data!r}.")
    kinds = {
        frozenset(field.name for field in dataclasses.fields(kind)): kind
        for kind in get_args(AnyRopeScaling)
    }
    if (kind := kinds.get(frozenset(data))) is None:
        known = "; or ".join(", ".join(sorted(names)) for names in kinds)
        raise ValueError(
            f"rope_scaling has the fields {known}; got {', '.join(sorted(data)) or 'none'}."
        )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


PRESETS: dict[str, ModelConfig] = {
    name: ModelConfig.from_dict({"name": name, **fields}) for name, fields in RELEASED.items()
}


def preset(name: str) -> ModelConfig:
    """The configuration of a known model.

    Args:
        name: one of `PRESETS`, as "llama3.2-1b".

    Returns:
        Its configuration, which nothing has been allocated for.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"No preset is called {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]
