"""Which tokens `top_k` and `top_p` keep, as far as is known.

Both keep the tokens whose logits are above some border. Where it lies is found out by looking at
places, which are logits too: how many tokens lie above each, and what they sum up to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

__all__ = ["PLACES", "Border", "first_places"]

# Places of a look; a power of two.
PLACES = 8
# Gumbel noise of float32 lies between -4.5 and 16.7: what lies further behind than this many
# temperatures never overtakes the likeliest.
_FURTHEST = 32.0
# The first places lie between so many temperatures behind the likeliest, each of them so many times
# as far as the one before; the last place is beneath all tokens.
_NEAREST, _GROWTH = 0.6, 20.0 ** (1 / (PLACES - 2))
# Looks after which the tokens between which the k-th likeliest lies are taken as equal to it: they
# lie within a millionth of a temperature.
_MOST_LOOKS = 12


def first_places(i: Array, most: Array, scale: Array) -> Array:
    """Where to look first, float32.

    Args:
        i: int32, which places, 0 to `PLACES` - 1.
        most: float32, the largest logit.
        scale: float32, the temperature.
    """
    behind = _NEAREST * jnp.exp2(i.astype(jnp.float32) * math.log2(_GROWTH))
    return jnp.where(i == PLACES - 1, -jnp.inf, most - scale * behind)


class Border(NamedTuple):
    """What is known; all are scalars, float32 but for the last.

    Attributes:
        inside: tokens with this logit or more are kept.
        outside: tokens with this logit or less are not, or cannot be drawn.
        few: less than k tokens lie above this.
        many: k or more do.
        least: what `top_k` keeps sums up to this or more.
        most: and to this or less.
        looks: int32, how many there were.
    """

    inside: Array
    outside: Array
    few: Array
    many: Array
    least: Array
    most: Array
    looks: Array

    @classmethod
    def unknown(cls, most: Array, scale: Array) -> Border:
        """Before the first look.

        Args:
            most: the largest logit, finite.
            scale: the temperature.
        """
        beyond = most - _FURTHEST * scale
        nothing = jnp.zeros_like(most)
        return cls(most, beyond, most, beyond, nothing, nothing + jnp.inf, jnp.int32(0))

    def places(self, i: Array, candidate: Array, top_p: Array) -> Array:
        """Where to look next, float32: at a candidate, and between what is known.

        Half of the places lie about the k-th token where the mass of what `top_k` keeps matters.

        Args:
            i: int32, which places, 0 to `PLACES` - 1.
            candidate: float32, a token's logit.
            top_p: float32.
        """
        both = (top_p < 1) & (self.least < self.most)
        here = PLACES - PLACES // 2 * both.astype(jnp.int32)
        among = i < here
        low = jnp.where(among, self.outside, self.many)
        high = jnp.where(among, self.inside, self.few)
        # The first place is the candidate's.
        step = jnp.where(among, i, i - here + 1)
        steps = jnp.where(among, here, here + 1)
        share = step.astype(jnp.float32) / steps.astype(jnp.float32)
        return jnp.where(i == 0, candidate, high - (high - low) * share)

    def narrowed(
        self, places: Array, counts: Array, masses: Array, top_k: Array, top_p: Array
    ) -> Border:
        """With what lies above some places.

        Args:
            places: float32 `[places]`.
            counts: int32 `[places]`.
            masses: float32 `[places]`.
            top_k: int32.
            top_p: float32.
        """

        def lowest(which: Array, values: Array, known: Array) -> Array:
            return jnp.minimum(known, jnp.min(jnp.where(which, values, jnp.inf)))

        def highest(which: Array, values: Array, known: Array) -> Array:
            return jnp.maximum(known, jnp.max(jnp.where(which, values, -jnp.inf)))

        enough = counts >= top_k
        # All that lies above a place is what `top_k` keeps, if it is k tokens exactly.
        least = highest(counts <= top_k, masses, self.least)
        most = lowest(enough | (places == -jnp.inf), masses, self.most)
        least = jnp.where(self.looks + 1 >= _MOST_LOOKS, most, least)
        # Of equal tokens all are kept, so that the likeliest always is.
        out = enough | ((top_p < 1) & (masses > 0) & (masses >= top_p * most))
        kept = ~enough & ((top_p >= 1) | (masses == 0) | (masses < top_p * least))
        return Border(
            inside=lowest(kept, places, self.inside),
            outside=highest(out, places, self.outside),
            few=lowest(~enough, places, self.few),
            many=highest(enough, places, self.many),
            least=least,
            most=most,
            looks=self.looks + 1,
        )
