"""The main job: loads the shipped model, continues a prompt, says how fast and by what.

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
    parser = argparse.ArgumentParser(description="Continues a prompt with the shipped model.")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=347)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest tokens")
    parser.add_argument("--top-p", type=float, default=0.8, help="of the likeliest, so much")
    parser.add_argument("--seed", type=int, default=15)
    args = parser.parse_args()

    tokenizer = ffjax.ByteTokenizer()
    model = ffjax.load(ffjax.SHIPPED_MODEL)
    sampling = ffjax.SamplingParams(
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop_token_ids=(tokenizer.eot_id,),
    )
    prompt = tokenizer.encode(args.prompt)
    out = ffjax.generate(model, prompt, args.max_new_tokens, sampling=sampling)

    print(args.prompt + tokenizer.decode(out.tokens[0]))
    # The first token comes with the prefill: a text of one has no decode steps to time.
    made, rate = len(out.tokens[0]), out.tokens_per_second
    speed = f"{rate:.1f} tokens/s in the decode loop" if math.isfinite(rate) else "no decode steps"
    how = f"temperature {args.temperature:g}, top-p {args.top_p:g}, seed {args.seed}"
    print(
        f"\n{model.config.name} ({model.config.num_params / 1e6:.1f} million weights) made "
        f"{made} token{'' if made == 1 else 's'}: {speed}.\n"
        f"They are {f'drawn, with {how}' if args.temperature else 'the likeliest ones'}. Decode "
        f"steps run with implementation={out.implementation!r} on "
        f"{jax.devices()[0].device_kind}. Prefill took {out.prefill_seconds:.3f} s; compiling, "
        f"which the figures leave out, {out.compile_seconds:.1f} s."
    )


if __name__ == "__main__":
    main()
