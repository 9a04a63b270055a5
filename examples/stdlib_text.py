"""Which files of the standard library the shipped model was never trained on, and their sizes.

    python examples/stdlib_text.py

`ffjax.stdlib_text` holds the rule; training, `ffjax fidelity` and the tests share it.
"""

from ffjax.stdlib_text import read_sources


def main() -> None:
    held_out = read_sources()[1]
    for source in held_out:
        print(f"{len(source.text):8} {source.name}")
    print(f"{sum(len(source.text) for source in held_out):8} bytes in {len(held_out)} files")


if __name__ == "__main__":
    main()
