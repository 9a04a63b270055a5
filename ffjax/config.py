"""Model configuration: the sizes and constants of a decoder-only transformer."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["PRESETS", "ModelConfig", "RopeScaling", "preset"]


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
class ModelConfig:
    """Sizes and constants of a model. The letters are those of every shape in ffjax.

    Attributes:
        name: what the model is called in messages.
        vocab_size: V, rows of the embedding and of the head.
        num_layers: L.
        model_dim: D, the width of the residual stream.
        ffw_dim: F, the width of the feed-forward block.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of K, G = N / K.
        head_dim: H, the size of one head.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3's stretching of them, or None.
        norm_eps: added to the mean square inside every RMSNorm.
        tied_embeddings: whether the head is the embedding itself.
        max_context: positions the model was made for; a cache may be shorter.
    """

    name: str = "custom"
    vocab_size: int
    num_layers: int
    model_dim: int
    ffw_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    max_context: int = 8192

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

    @property
    def q_per_kv(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_params(self) -> int:
        """Number of weights; a tied head counts once."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = (
            self.model_dim * (qkv + self.num_heads * self.head_dim)
            + 3 * self.model_dim * self.ffw_dim
            + 2 * self.model_dim
        )
        tables = 1 if self.tied_embeddings else 2
        vocab = tables * self.vocab_size * self.model_dim
        return self.num_layers * layer + vocab + self.model_dim

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON-able data; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Builds a configuration from `to_dict`'s data.

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
        scaling = data.get("rope_scaling")
        if isinstance(scaling, dict):
            fields = {f.name for f in dataclasses.fields(RopeScaling)}
            if set(scaling) != fields:
                raise ValueError(
                    f"rope_scaling has the fields {', '.join(sorted(fields))}; "
                    f"got {', '.join(sorted(scaling)) or 'none'}."
                )
            data = {**data, "rope_scaling": RopeScaling(**scaling)}
        elif scaling is not None:
            raise ValueError(f"rope_scaling is a table of fields or null, got {scaling!r}.")
        return cls(**data)


_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}

_LLAMA3 = {
    "vocab_size": 128_256,
    "head_dim": 128,
    "num_kv_heads": 8,
    "rope_theta": 500_000.0,
    "norm_eps": 1e-5,
    "max_context": 131_072,
}

PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig(
            **{**_LLAMA3, "head_dim": 64},
            name="llama3.2-1b",
            num_layers=16,
            model_dim=2048,
            ffw_dim=8192,
            num_heads=32,
            rope_scaling=RopeScaling(factor=32.0, **_LLAMA3_SCALING),
            tied_embeddings=True,
        ),
        ModelConfig(
            **_LLAMA3,
            name="llama3.2-3b",
            num_layers=28,
            model_dim=3072,
            ffw_dim=8192,
            num_heads=24,
            rope_scaling=RopeScaling(factor=32.0, **_LLAMA3_SCALING),
            tied_embeddings=True,
        ),
        ModelConfig(
            **_LLAMA3,
            name="llama3.1-8b",
            num_layers=32,
            model_dim=4096,
            ffw_dim=14_336,
            num_heads=32,
            rope_scaling=RopeScaling(factor=8.0, **_LLAMA3_SCALING),
        ),
        # The model shipped with the package (see checkpoints/MODEL_CARD.md):
        # 256 bytes and one end-of-text token.
        ModelConfig(
            name="python-bytes-3m",
            vocab_size=257,
            num_layers=4,
            model_dim=256,
            ffw_dim=768,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            rope_theta=10_000.0,
            tied_embeddings=True,
            max_context=2048,
        ),
    )
}


def preset(name: str) -> ModelConfig:
    """The configuration called `name`.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"No preset is called {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]
