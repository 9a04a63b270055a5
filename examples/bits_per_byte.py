"""Bits per byte of the shipped model on held-out files of the standard library.

    python examples/bits_per_byte.py --files 2

For a checkpoint and a text of your own: `ffjax eval PATH --text FILE`. `ffjax.evaluate`
holds the arithmetic.
"""

import argparse

import ffjax
from ffjax.evaluate import bits_per_byte
from ffjax.stdlib_text import read_sources


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte on held-out files.")
    parser.add_argument("--files", type=int, default=2, help="the shortest N; default: %(default)s")
    args = parser.parse_args()
    if args.files < 1:
        parser.error(f"at least one file is needed, got {args.files}")

    model = ffjax.load(ffjax.SHIPPED_MODEL)
    by_size = sorted(read_sources()[1], key=lambda source: len(source.text))
    for source in by_size[: args.files]:
        bits = bits_per_byte(model, [source.text], context=model.config.max_context)
        print(f"{source.name}: {bits:.3f} bits per byte over {len(source.text)} bytes")


if __name__ == "__main__":
    main()
