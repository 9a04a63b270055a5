"""The main job: loads the shipped model, continues a prompt, says how fast and by what.

python examples/generate.py
python examples/generate.py --prompt "class Stack:" --max-new-tokens 300 --temperature 0.5
"""

import argparse
import math

import jax

import ffjax
from ffjax.tokenizer import ByteTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Continues a prompt with the shipped model.")
    parser.add_argument("--prompt", default="def read_file(path):\n", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()

    tokenizer = ByteTokenizer()
    model = ffjax.load(ffjax.SHIPPED_MODEL)
    out = ffjax.generate(
        model,
        [tokenizer.encode(args.prompt)],
        args.max_new_tokens,
        temperature=args.temperature,
        stop_token=tokenizer.eot_id,
    )

    print(args.prompt + tokenizer.decode(out.tokens[0]))
    # The first token comes with the prefill: a text of one has no decode steps to time.
    made, rate = len(out.tokens[0]), out.tokens_per_second
    speed = f"{rate:.1f} tokens/s in the decode loop" if math.isfinite(rate) else "no decode steps"
    print(
        f"\n{model.config.name} ({model.config.num_params / 1e6:.1f} million weights) made "
        f"{made} token{'' if made == 1 else 's'}: {speed}."
    )
    print(
        f"Decode steps run with implementation={out.implementation!r} on "
        f"{jax.devices()[0].device_kind}. Prefill took {out.prefill_seconds:.3f} s; compiling, "
        f"which the figures leave out, {out.compile_seconds:.1f} s."
    )


if __name__ == "__main__":
    main()
