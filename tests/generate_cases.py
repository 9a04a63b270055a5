"""The model that tests of a generation's course run: what it says is of no matter."""

from ffjax.config import ModelConfig

__all__ = ["TINY"]

TINY = ModelConfig(
    name="tiny",
    vocab_size=257,
    num_layers=1,
    model_dim=32,
    ffw_dim=48,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_context=400,
)
