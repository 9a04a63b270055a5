"""Which tokens `top_k` and `top_p` keep, as far as is known.

Both keep the tokens whose logits are above some border. Where it lies is found out by looking at
places, which are logits too: how many tokens lie above each, and what they sum up to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

__all__ = ["Border", "first_places", "out_of_reach"]

# Gumbel noise of float32 lies between -4.5 and 16: what lies further behind than this many
# temperatures never overtakes the likeliest.
_FURTHEST = 22.0
# The first places lie from so many temperatures behind the likeliest to so many.
_NEAREST, _LAST = 0.6, 12.0
# Looks after which the tokens between which the k-th likeliest lies are taken as equal to it: they
# lie within a millionth of a temperature.
_MOST_LOOKS = 12


def first_places(number: int, most: Array, scale: Array) -> list[Array]:
    """Where to look first, float32 scalars, falling.

    Each lies so many times as far behind the likeliest as the one before; the last one is beneath
    all tokens.

    Args:
        number: of places, 3 or more.
        most: float32, the largest logit.
        scale: float32, the temperature.
    """
    growth = (_LAST / _NEAREST) ** (1 / (number - 2))
    places = [most - scale * (_NEAREST * growth**i) for i in range(number - 1)]
    return [*places, jnp.full_like(most, -jnp.inf)]


def out_of_reach(most: Array, scale: Array) -> Array:
    """A logit, float32: tokens with less are never drawn, whatever their noise is.

    Args:
        most: the largest logit, finite.
        scale: the temperature.
    """
    return most - _FURTHEST * scale


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
        beyond = out_of_reach(most, scale)
        nothing = jnp.zeros_like(most)
        return cls(most, beyond, most, beyond, nothing, nothing + jnp.inf, jnp.int32(0))

    def places(self, number: int, candidate: Array, top_p: Array) -> list[Array]:
        """Where to look next, float32 scalars: at a candidate, and between what is known.

        Half of the places lie about the k-th token where the mass of what `top_k` keeps matters.

        Args:
            number: of places.
            candidate: float32, a token's logit.
            top_p: float32.
        """
        both = (top_p < 1) & (self.least < self.most)
        here = number - number // 2
        share = 1 / number + (1 / here - 1 / number) * both.astype(jnp.float32)
        among = (self.inside - self.outside) * share
        about = (self.few - self.many) * (1 / (number - here + 1))
        # The first place is the candidate's.
        places = [candidate, *(self.inside - among * i for i in range(1, here))]
        for i in range(here, number):
            near = self.few - about * (i - here + 1)
            places.append(jnp.where(both, near, self.inside - among * i))
        # Where all tokens are kept there is no border to look for, and nothing lies above infinity.
        return [jnp.where(place == place, place, jnp.inf) for place in places]

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
