"""The likeliest tokens of many rows of logits, and log-probabilities, in two launches.

`order` has logits as integers, `survey` looks at all of them, `rank` at those groups that hold the
likeliest, and `room` is where logits of step after step are kept.
"""

from pallas_kernels.logprobs.order import LEAST, ordered, unordered
from pallas_kernels.logprobs.rank import MOST_TOKENS, likeliest
from pallas_kernels.logprobs.room import room

__all__ = ["LEAST", "MOST_TOKENS", "likeliest", "ordered", "room", "unordered"]
