"""The last hidden state out: texts as vectors, and which of them are alike.

    python examples/text_embeddings.py

The vector of a text is the mean of the last hidden state over its tokens, less the mean over all
texts, of length 1. The shipped model knows Python and little else: it tells code from prose.
"""

import jax.numpy as jnp
from flax import nnx

import ffjax

TEXTS = (
    "def area(width, height):\n    return width * height\n",
    "def perimeter(width, height):\n    return 2 * (width + height)\n",
    "# The garden was quiet, and nobody had watered the roses since spring.\n",
    "# A small cat slept on the chair beside the window all afternoon long.\n",
    "import os\nimport sys\nimport shutil\n",
    "import json\nimport socket\nimport logging\n",
)


def main() -> None:
    model, tokenizer = ffjax.load(ffjax.SHIPPED_MODEL), ffjax.ByteTokenizer()
    vectors = embed(model, [tokenizer.encode(text) for text in TEXTS])
    alike = vectors @ vectors.T
    nearest = (alike - 2 * jnp.eye(len(TEXTS))).argmax(axis=1)
    for i, text in enumerate(TEXTS):
        j = int(nearest[i])
        print(f"{text.splitlines()[0][:40]!r} is nearest to")
        print(f"    {TEXTS[j].splitlines()[0][:40]!r} ({alike[i, j]:.2f})")


def embed(model: ffjax.Transformer, texts: list[list[int]]) -> jnp.ndarray:
    """Vectors float32 `[B, D]`, of length 1, of texts that are token ids."""
    longest = max(map(len, texts))
    # Padding stands after: what comes before it does not see it.
    tokens = jnp.array([text + [0] * (longest - len(text)) for text in texts])
    lengths = jnp.array([len(text) for text in texts])
    hidden = nnx.jit(lambda model, tokens: model.last_hidden_state(tokens))(model, tokens)
    counts = jnp.arange(longest) < lengths[:, None]  # [B, T]
    means = jnp.where(counts[..., None], hidden, 0).sum(axis=1) / lengths[:, None]
    means -= means.mean(axis=0)
    return means / jnp.linalg.norm(means, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
