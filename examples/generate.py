"""The main job: loads the shipped model, continues a text, says how fast and by what.

python examples/generate.py
python examples/generate.py --prompt "class Stack:" --max-new-tokens 300 --seed 1
python examples/generate.py --temperature 0

Tokens are drawn, with a seed: the same command prints the same text. The model is small, and
its likeliest tokens, those of temperature 0, soon repeat themselves.
"""

import argparse
import math

import jax

import ffjax

PROMPT = '''\
class Error(Exception):
    """Base class for errors of this module."""


class '''


def main() -> None:
    parser = argparse.ArgumentParser(description="Continues a text with the shipped model.")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=347)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest tokens")
    parser.add_argument("--top-p", type=float, default=0.8, help="draw among the likeliest")
    parser.add_argument("--seed", type=int, default=15)
    args = parser.parse_args()

    generator = ffjax.Generator.load()
    try:
        out = generator.generate(
            args.prompt,
            max_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )
    except ValueError as error:  # what was asked for, in a sentence
        parser.error(str(error))

    print(args.prompt + out.text)
    config = generator.model.config
    # The first token comes with the prefill: a text of one has no decode steps to time.
    made, rate = len(out.tokens), out.tokens_per_second
    speed = f"{rate:.1f} tokens/s in the decode loop" if math.isfinite(rate) else "no decode steps"
    how = f"temperature {args.temperature:g}, top-p {args.top_p:g}, seed {args.seed}"
    print(
        f"\n{config.name} ({config.num_params / 1e6:.1f} million weights) made "
        f"{made} token{'' if made == 1 else 's'}: {speed}.\n"
        f"They are {f'drawn: {how}' if args.temperature else 'the likeliest ones'}. Decode steps "
        f"run with implementation={out.implementation!r} on {jax.devices()[0].device_kind}. "
        f"Prefill took {out.prefill_seconds:.3f} s; compiling, which the figures leave out, "
        f"{out.compile_seconds:.1f} s."
    )


if __name__ == "__main__":
    main()
