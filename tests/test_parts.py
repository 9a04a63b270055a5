"""A model is looked over at each request, and what it holds now is what runs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import small_config
from flax import nnx

from ffjax import parts
from ffjax.formats import INT8, WeightFormats
from ffjax.generation import generate
from ffjax.model import Layers, Transformer
from ffjax.parcel import as_words
from ffjax.parts import Parts
from ffjax.programs import kind_of
from ffjax.quantization import quantize
from ffjax.streaming import stream

CONFIG = small_config(vocab_size=53)


def made(seed: int = 0, dtype: Any = jnp.float32, **fields: Any) -> Transformer:
    return Transformer(small_config(vocab_size=53, **fields), rngs=nnx.Rngs(seed), dtype=dtype)


def agrees(model: Transformer) -> Parts:
    """The parts, which are what `nnx.split` makes of the model."""
    got = Parts.of(model)
    graphdef, state = nnx.split(model)
    again, held = nnx.split(got.graphdef.merged(got.state))
    assert again == graphdef
    pairs = zip(jax.tree.leaves(held), jax.tree.leaves(state), strict=True)
    assert all(one is other for one, other in pairs)
    assert got.config is model.config and got.dtype == model.dtype
    assert got.kinds.structure is got.graphdef
    assert got.kinds.kinds == tuple(map(kind_of, got.state))
    return got


def value(model):
    model.embed[...] = model.embed[...] + 1


def variable(model):
    model.final_norm = nnx.Param(model.final_norm[...] * 2)


def other_order(model):
    kept = model.embed
    del model.embed
    model.embed = kept
    model.final_norm[...] = model.final_norm[...] * 2


def submodule(model):
    model.layers = made(1).layers


def swapped(model):
    norms = model.layers.attn_norm[...], model.layers.mlp_norm[...]
    model.layers.mlp_norm[...], model.layers.attn_norm[...] = norms


def dtype(model):
    for each in (*vars(model).values(), *vars(model.layers).values()):
        if isinstance(each, nnx.Param):
            each.set_value(each[...].astype(jnp.bfloat16))


def quantized(model):
    other = quantize(model, WeightFormats.of_layers(INT8))
    model.config, model.layers = other.config, other.layers


def tied(model):
    model.config = small_config(vocab_size=53, tied_embeddings=True)
    model.head = None


def config(model):
    model.config = small_config(vocab_size=53, norm_eps=0.5)


class OtherLayers(Layers):
    """Which do something else, perhaps."""


def other_class(model):
    object.__setattr__(model.layers, "__class__", OtherLayers)


def shared(model):
    model.head = model.embed


def shared_module(model):
    model.other = model.layers


def metadata(model):
    model.embed.set_metadata(whose="mine")


def a_list(model):
    model.others = nnx.List([nnx.Param(jnp.ones(3))])


def numpys(model):
    model.embed = nnx.Param(np.ones((53, CONFIG.model_dim), np.float32))


CHANGES = [
    *(value, variable, other_order, submodule, swapped, dtype, quantized, tied),
    *(config, other_class, shared, shared_module, metadata, a_list, numpys),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_changed_is_seen(change):
    model = made()
    before = agrees(model)
    assert agrees(model).kinds is before.kinds
    change(model)
    after = agrees(model)
    # Those that change no shape and no structure share what was compiled.
    same = {"value", "variable", "other_order", "submodule", "swapped"}
    assert (after.kinds is before.kinds) == (change.__name__ in same)
    assert agrees(model).kinds is after.kinds
    value(model)
    agrees(model)


def test_one_array_of_two_variables_is_no_place_of_either():
    model = made()
    model.layers.mlp_norm[...] = model.layers.attn_norm[...]
    assert model.layers.mlp_norm.get_raw_value() is model.layers.attn_norm.get_raw_value()
    agrees(model)
    model.layers.attn_norm[...] = model.layers.attn_norm[...] * 2
    agrees(model)


def test_which_variable_is_shared_is_seen():
    model = made()
    for shared in (model.embed, model.final_norm):
        for name in ("other", "one_more"):
            setattr(model, name, shared)
            agrees(model)


def test_models_alike_share_what_is_compiled():
    one, two = Parts.of(made(1)), Parts.of(made(2))
    assert one.kinds is two.kinds
    assert one.graphdef is not Parts.of(made(qkv_bias=True)).graphdef
    assert one.kinds is not Parts.of(made(dtype=jnp.bfloat16)).kinds


def test_another_model_in_the_place_of_one_that_is_gone_is_another():
    splits = [nnx.split(made(seed)) for seed in (1, 2)]
    for number in range(20):  # Python may put them in the same place, or not
        model = nnx.merge(*splits[number % 2])
        place = id(model)
        agrees(model)
        assert place in {id(one) for one in parts._known}
        del model
        gc.collect()
        # So nothing is found there, whichever model comes next.
        assert place not in {id(one) for one in parts._known}


def test_nothing_of_a_model_stays_for_it():
    gc.collect()
    before = len(parts._known)
    model = made()
    Parts.of(model)
    assert len(parts._known) == before + 1
    old = weakref.ref(model.embed.get_raw_value())
    model.embed[...] = model.embed[...] * 2
    gc.collect()
    assert old() is None, "weights that were replaced are still there"
    del model
    gc.collect()
    assert len(parts._known) == before


def test_a_generation_is_of_the_weights_that_the_model_holds():
    model, other = made(1), made(2)
    first = generate(model, [1, 2, 3], 5).tokens
    want = generate(other, [1, 2, 3], 5).tokens
    assert first != want
    for name in ("embed", "final_norm", "head"):
        getattr(model, name)[...] = getattr(other, name)[...]
    model.layers = other.layers
    assert generate(model, [1, 2, 3], 5).tokens == want


def test_a_stream_goes_on_with_the_weights_that_it_began_with():
    model = made(1)
    want = list(stream(model, [1, 2, 3], 30))
    begun = stream(model, [1, 2, 3], 30)
    got = [next(begun)]
    model.embed[...] = made(2).embed[...]
    assert [*got, *begun] == want
    assert list(stream(model, [1, 2, 3], 30)) != want


def test_a_parcel_is_opened_as_it_was_packed():
    tree = {
        "ids": np.array([[1, -2], [3, 2**31 - 1]], np.int32),
        "seeds": np.array([2**32 - 1, 0, 7], np.uint32),
        "numbers": np.array([0.5, -np.inf, 1e-45], np.float32),
        "one": np.float32(3),
        "none": None,
        "empty": np.zeros((0, 3), np.int32),
    }
    words, layout = as_words(tree)
    assert words.dtype == np.int32 and words.shape == (11,)
    opened = jax.jit(layout.opened)(words)
    assert jax.tree.structure(opened) == jax.tree.structure(tree)
    for name in ("ids", "seeds", "numbers", "one", "empty"):
        got, want = np.asarray(opened[name]), np.asarray(tree[name])
        assert got.dtype == want.dtype and got.shape == want.shape
        assert got.tobytes() == want.tobytes()
