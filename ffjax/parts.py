"""A model taken apart, as programs take it."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array
from jax.core import Tracer

from ffjax.config import ModelConfig
from ffjax.decode import device_of
from ffjax.model import Transformer
from ffjax.programs import kind_of

__all__ = ["Parts", "Structure", "WeightKinds", "taken_apart"]


class Structure:
    """What of a model is no array.

    There is one object for all models of a structure: two are the same if they are the same object.
    So whoever is to find something by it need not look through it.
    """

    def __init__(self, graphdef: Any, tree: Any):
        """Made by `taken_apart`."""
        self._graphdef, self._tree = graphdef, tree

    def merged(self, state: tuple[Any, ...]) -> Transformer:
        """The model of these arrays, which may be traced: those that `taken_apart` returns."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, state))


class WeightKinds:
    """What of a model's arrays, and of its structure, a program is compiled for.

    There is one object for all models of which these are equal, as of `Structure`.
    """

    def __init__(self, structure: Structure, kinds: tuple[Any, ...]):
        """Made by `Parts.of`."""
        self.structure, self.kinds = structure, kinds


# Each is there as long as a model, a compiled program or a request has it.
_structures: weakref.WeakValueDictionary[Any, Structure] = weakref.WeakValueDictionary()
_weight_kinds: weakref.WeakValueDictionary[Any, WeightKinds] = weakref.WeakValueDictionary()


def taken_apart(model: Transformer) -> tuple[Structure, tuple[Any, ...]]:
    """A model's structure, and its arrays in the order of their names: a cheaper `nnx.split`.

    A pytree of Flax is taken apart in Python at each call of a program; a tuple is not.
    """
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    key = graphdef, tree
    structure = _structures.get(key)
    if structure is None:
        # Of two threads that come here at a time, one is told the other's.
        structure = _structures.setdefault(key, Structure(graphdef, tree))
    return structure, tuple(leaves)


class Parts(NamedTuple):
    """A model's structure and its arrays, and what is asked of it often.

    Attributes:
        graphdef: the structure; static.
        state: the arrays, a tuple.
        config: the model's.
        dtype: of weights that are not quantized.
        device: that the weights are on.
        kinds: what programs are compiled for.
    """

    graphdef: Structure
    state: tuple[Any, ...]
    config: ModelConfig
    dtype: Any
    device: Any
    kinds: WeightKinds

    @classmethod
    def of(cls, model: Transformer) -> Parts:
        """Takes a model apart.

        What was found out of this model is used again where all that it was found out of is as it
        was; the arrays are always those that the model holds now.
        """
        look = _look_at(model)
        known = _known.get(model)
        if look is not None and known is not None and known.look == look.seen:
            structure, state = known.kinds.structure, known.order(look.arrays)
            if all(one() is array for one, array in zip(known.arrays, state, strict=True)):
                return cls(structure, state, *known.about, known.kinds)
        else:
            structure, state = taken_apart(model)
        kinds = _kinds_of(structure, state)
        about = model.config, model.dtype, device_of(model)
        _keep(model, look, state, kinds, about)
        return cls(structure, state, *about, kinds)


def _kinds_of(structure: Structure, state: tuple[Any, ...]) -> WeightKinds:
    key = structure, tuple(map(kind_of, state))
    kinds = _weight_kinds.get(key)
    return _weight_kinds.setdefault(key, WeightKinds(*key)) if kinds is None else kinds


class _Look(NamedTuple):
    """A model as it is.

    Attributes:
        seen: all that `nnx.split` would look at, but for the arrays.
        arrays: that the variables hold, in the order in which they were found.
    """

    seen: list[Any]
    arrays: list[Any]


class _Known(NamedTuple):
    """What was found out of a model.

    Attributes:
        look: what the model looked like.
        order: puts the arrays of a look in the order of `Parts.state`.
        arrays: those of then. Weights that a model no longer holds do not stay for this.
        kinds: as those of `Parts`.
        about: config, dtype and device, likewise.
    """

    look: list[Any]
    order: Callable[[list[Any]], tuple[Any, ...]]
    arrays: list[weakref.ref[Any]]
    kinds: WeightKinds
    about: tuple[ModelConfig, Any, Any]


# A model's entry goes with it, so that none is found by another one in its place.
_known: weakref.WeakKeyDictionary[Transformer, _Known] = weakref.WeakKeyDictionary()

_END = object()
_raw_value = operator.methodcaller("get_raw_value")
if not hasattr(nnx.Variable, "get_raw_value"):  # Flax before 0.12.1
    _raw_value = operator.attrgetter("raw_value")


@functools.cache
def _what(kind: type) -> str:
    """What values of a Python type are to a look. Flax's own checks of an instance are slow."""
    if issubclass(kind, nnx.Variable):
        return "variable"
    if issubclass(kind, nnx.Module):
        return "module"
    # Compared as it is.
    plain = ModelConfig, str, bytes, bool, int, float, type(None)
    return "plain" if issubclass(kind, plain) else "other"


@functools.cache
def _is_array(kind: type) -> bool:
    """Whether it is an array's: a reference's content may change, and numpy's arrays, too."""
    return issubclass(kind, Array) and not issubclass(kind, Tracer)


def _look_at(model: Transformer) -> _Look | None:
    """Looks at a model; None where it holds what is not looked at here."""
    look = _Look([], [])
    return look if _look_into(model, look, {}) else None


def _look_into(module: nnx.Module, look: _Look, met: dict[int, int]) -> bool:
    """Looks at a module and those within; False where that is not enough.

    Args:
        module: the module.
        look: grows.
        met: the number of each module and variable that was met, by its identity.
    """
    seen, arrays = look
    met[id(module)] = len(met)
    seen.append(type(module))
    for name, value in vars(module).items():
        seen.append(name)
        what = _what(type(value))
        if what == "variable":
            if (number := met.get(id(value))) is not None:
                seen.append(number)
                continue
            met[id(value)] = len(met)
            array = _raw_value(value)
            if not _is_array(type(array)):
                return False
            seen.append(type(value))
            seen.append(value.get_metadata())
            arrays.append(array)
        elif what == "plain" or name.startswith("_pytree__"):
            seen.append(value)
        elif what == "other":
            return False
        elif (number := met.get(id(value))) is not None:
            seen.append(number)
        elif not _look_into(value, look, met):
            return False
    seen.append(_END)
    return True


def _keep(
    model: Transformer,
    look: _Look | None,
    state: tuple[Any, ...],
    kinds: WeightKinds,
    about: tuple[ModelConfig, Any, Any],
) -> None:
    """Keeps what was found out, where the next look can tell whether it still holds."""
    arrays = look.arrays if look is not None else []
    places = {id(array): at for at, array in enumerate(arrays)}
    # Where two variables hold one array, it does not tell which is whose.
    if (
        look is None
        or not len(places) == len(arrays) == len(state)
        or any(id(one) not in places for one in state)
    ):
        _known.pop(model, None)
        return
    order = [places[id(one)] for one in state]

    def ordered(arrays: list[Any]) -> tuple[Any, ...]:
        return tuple([arrays[at] for at in order])

    # Flax before 0.12.1 hands out a variable's own dictionary, which may be changed in place.
    seen = [dict(one) if type(one) is dict else one for one in look.seen]
    held = [weakref.ref(one) for one in state]
    _known[model] = _Known(seen, ordered, held, kinds, about)
