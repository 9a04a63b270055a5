"""Draws the next token of each sequence from its logits, in one launch.

`plan` cuts the rows among programs, `kernel` draws, `penalties` changes logits by which tokens came
before, `border` is what is known of the filters, `mass` how likely tokens are, `exchange` how
programs tell each other what they have found, and `threefry` makes the noise.
"""

from pallas_kernels.draw.kernel import Drawn, draw_tokens, no_board
from pallas_kernels.draw.penalties import Before
from pallas_kernels.draw.plan import DrawPlan, make_draw_plan

__all__ = ["Before", "DrawPlan", "Drawn", "draw_tokens", "make_draw_plan", "no_board"]
