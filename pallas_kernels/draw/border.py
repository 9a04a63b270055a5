"""Which tokens `top_k` and `top_p` keep, as far as is known.

Both keep the tokens whose logits are above some border. Where it lies is found out by looking at
places, which are logits too: how many tokens lie above each, and what they sum up to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["WINNERS", "Border", "first_places", "out_of_reach"]

# Gumbel noise of float32 lies between -4.5 and 16: what lies further behind than this many
# temperatures never overtakes the likeliest.
_FURTHEST = 22.0
# The first places lie from so many temperatures behind the likeliest to so many.
_NEAREST, _LAST = 0.6, 12.0
# Looks after which the tokens between which the k-th likeliest lies are taken as equal to it: they
# lie within a millionth of a temperature.
_MOST_LOOKS = 16
# Where a look after the first one looks, about the place where the border should lie: in widths
# that an estimate may be wrong by.
_ABOUT = 1.5, 0.5, -0.5, -1.5
# That width for the border of `top_p`, in parts of what is not known. Estimates were wrong by up to
# a twelfth, of normal logits of all spreads.
_WRONG = 1 / 15
# Of the k-th token it follows from how many tokens are between what is known; within these parts.
_LEAST_WRONG, _MOST_WRONG = 1 / 60, 1 / 5
# In binary logarithms: what a number of tokens is wrong by, and what a mass is, by 1 / sqrt(k).
_PER_LOG, _LOOSE = 1.5 * math.log2(math.e), 0.5 * math.log2(math.e)
# The least part of a mass that an estimate goes by.
_LEAST_PART = 1e-3
# Of what is less there is no logarithm worth going by.
_SOME = 2.0**-10

WINNERS = 3
"""The last so many places of `Border.places` are those that may turn out to be the border."""


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


def _log(x: Array) -> Array:
    """A binary logarithm, to a hundredth: enough for a guess, and a tenth of the instructions.

    Args:
        x: float32; what is less than `_SOME`, or infinite, is taken for a number next to it.
    """
    bits = lax.bitcast_convert_type(jnp.maximum(x, _SOME), jnp.int32)
    one_to_two = lax.bitcast_convert_type(bits & 0x7FFFFF | 0x3F800000, jnp.float32)
    beyond = one_to_two - 1
    exponent = lax.shift_right_arithmetic(bits, jnp.full_like(bits, 23)) - 127
    return exponent.astype(jnp.float32) + beyond + 0.3466 * beyond * (1 - beyond)


def _part(x: Array) -> Array:
    """x within 0 to 1; a half where nothing can be said."""
    return jnp.where(jnp.abs(x) < jnp.inf, jnp.clip(x, 0.0, 1.0), 0.5)


class Border(NamedTuple):
    """What is known; all are scalars, float32 but for the last.

    Attributes:
        inside: tokens with this logit or more are kept.
        outside: tokens with this logit or less are not, or cannot be drawn.
        mass_inside: what lies above the first sums up to.
        mass_outside: what lies above the second does; infinite as long as it is not known.
        few: less than k tokens lie above this.
        many: k or more do.
        count_few: as many as lie above the first.
        count_many: above the second.
        least: what `top_k` keeps sums up to this or more.
        most: and to this or less.
        looks: int32, how many there were.
    """

    inside: Array
    outside: Array
    mass_inside: Array
    mass_outside: Array
    few: Array
    many: Array
    count_few: Array
    count_many: Array
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
        endless = nothing + jnp.inf
        masses = counts = nothing, endless
        return cls(most, beyond, *masses, most, beyond, *counts, nothing, endless, jnp.int32(0))

    def places(self, beneath: Array, top_k: Array, top_p: Array) -> list[Array]:
        """Where to look next, float32 scalars: five, of which the last ones are `WINNERS`.

        They lie about where the border should be, and in some looks evenly, so that what is not
        known shrinks whatever the logits are. Where the mass of what `top_k` keeps matters and is
        not known, two or three lie about the k-th token, and two on either side of the border.

        Args:
            beneath: float32, what lies beneath it is out. May be a token's logit, of which the look
                tells whether it is kept.
            top_k: int32.
            top_p: float32.
        """
        by_mass = top_p < 1
        both = by_mass & (self.least < self.most)
        # A row takes one of three ways, whose instructions the others do without.
        places = lax.cond(
            both,
            lambda: self._about_both(beneath, top_k, top_p),
            lambda: self._about_one(
                beneath,
                *lax.cond(by_mass, lambda: self._by_mass(top_p), lambda: self._kth(top_k)),
            ),
        )
        # Where it is known of all tokens there is no border to look for.
        unknown = self.outside < self.inside
        return [jnp.where(unknown & (place == place), place, beneath) for place in places]

    def _kth(self, top_k: Array) -> tuple[Array, Array]:
        """Where the k-th likeliest should lie between `few` and `many`, from 0 to 1.

        As if the logarithm of the number grew evenly; and by how much that may be wrong, if tokens
        lie at random.
        """
        k = top_k.astype(jnp.float32)
        few, many = _log(self.count_few), _log(self.count_many)
        number = self.count_many - self.count_few
        share = _part((k - self.count_few) / number)
        wobble = jnp.exp2(0.5 * _log(number * share * (1 - share) + 1))
        wrong = jnp.clip(_PER_LOG * wobble / (k * (many - few)), _LEAST_WRONG, _MOST_WRONG)
        return _part((_log(k - 0.5) - few) / (many - few)), wrong

    def _by_mass(self, top_p: Array) -> tuple[Array, Array]:
        """Where the border of `top_p` should lie between `inside` and `outside`, from 0 to 1.

        As if the logarithm of the mass above, divided by the mass beneath, grew evenly; and by how
        much that may be wrong. The whole is known.
        """
        whole = self.most

        def ratio(mass: Array) -> Array:
            return _log(mass) - _log(jnp.maximum(whole - mass, _LEAST_PART * whole))

        start, end = ratio(self.mass_inside), ratio(self.mass_outside)
        wanted = _log(top_p) - _log(1 - top_p)
        # Triton's branches return no constants.
        return _part((wanted - start) / (end - start)), 0.0 * top_p + _WRONG

    def _about_one(self, beneath: Array, guess: Array, wrong: Array) -> tuple[Array, ...]:
        """Four places about the border, and what is beneath."""
        by_guess = self.looks % 3 != 0
        width = self.inside - self.outside
        first, *others = (
            self.inside
            - width * jnp.where(by_guess, jnp.clip(guess - by * wrong, 0.0, 1.0), (i + 1) / 5)
            for i, by in enumerate(_ABOUT)
        )
        return first, beneath, *others

    def _about_both(self, beneath: Array, top_k: Array, top_p: Array) -> tuple[Array, ...]:
        """Places about the k-th token and about the border, by what the first look has found."""
        by_guess = self.looks == 1
        kth, wrong = self._kth(top_k)
        width = self.few - self.many
        about_kth = [
            self.few - width * jnp.where(by_guess, jnp.clip(kth - by * wrong, 0.0, 1.0), even)
            for by, even in ((_ABOUT[0], 1 / 3), (_ABOUT[-1], 2 / 3))
        ]
        # The mass of what `top_k` keeps as if its logarithm grew evenly, too.
        inside, least, most = map(_log, (self.mass_inside, self.least, self.most))
        wanted = _log(top_p) + least + kth * (most - least)
        # On either side of what may be the border for all that is known of that mass by then.
        off = _ABOUT[0] * wrong * (most - least)
        off += _LOOSE * jnp.exp2(-0.5 * _log(top_k.astype(jnp.float32)))

        def about(wanted: Array, even: float) -> Array:
            nearer = wanted <= least
            first = jnp.where(nearer, self.inside, self.few)
            last = jnp.where(nearer, self.few, self.many)
            start, end = jnp.where(nearer, inside, least), jnp.where(nearer, least, most)
            guess = first - (first - last) * _part((wanted - start) / (end - start))
            return jnp.where(by_guess, guess, self.inside - (self.inside - self.outside) * even)

        # Where no token is to be asked about, what is beneath is known.
        third = self.few - width * jnp.where(by_guess, kth, 1 / 2)
        fifth = jnp.where(beneath > self.outside, beneath, third)
        border = about(wanted - off, 1 / 3), about(wanted + off, 2 / 3)
        return about_kth[0], *border, fifth, about_kth[1]

    def narrowed(
        self, places: Array, counts: Array, masses: Array, top_k: Array, top_p: Array
    ) -> tuple[Border, Array]:
        """With what lies above some places; and which of these are outside, bool `[places]`.

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
        numbers = counts.astype(jnp.float32)
        border = Border(
            inside=lowest(kept, places, self.inside),
            outside=highest(out, places, self.outside),
            mass_inside=highest(kept, masses, self.mass_inside),
            mass_outside=lowest(out, masses, self.mass_outside),
            few=lowest(~enough, places, self.few),
            many=highest(enough, places, self.many),
            count_few=highest(~enough, numbers, self.count_few),
            count_many=lowest(enough, numbers, self.count_many),
            least=least,
            most=most,
            looks=self.looks + 1,
        )
        return border, out | (places <= self.outside)
