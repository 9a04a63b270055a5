"""Draws the next token of each sequence from its logits, in one launch.

`plan` cuts the vocabulary among programs, `kernel` draws, `exchange` is how programs tell each
other what they have found, `threefry` makes the noise.
"""

from pallas_kernels.draw.kernel import draw_tokens, no_arrivals
from pallas_kernels.draw.plan import DrawPlan, make_draw_plan

__all__ = ["DrawPlan", "draw_tokens", "make_draw_plan", "no_arrivals"]
