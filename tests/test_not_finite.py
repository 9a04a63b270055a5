"""A model whose logits are NaN or infinite: generation raises, and says where."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from decode_cases import QUICK_COMPILE, filled_cache, random_tokens, small_config
from decode_cases import random_model as random_decode_model
from flax import nnx
from generate_cases import TINY

import checkpoints
from ffjax.broken import NotFiniteError
from ffjax.cache import KVCache
from ffjax.cli import main
from ffjax.decode import decode_step, fused_step, step_fault
from ffjax.generation import generate
from ffjax.loop import BLOCK, NOT_FINITE, Loop
from ffjax.model import Transformer
from ffjax.sampling.choose import marked as mark
from ffjax.streaming import stream
from ffjax.tokenizer import ByteTokenizer
from pallas_kernels.gpu import INTERPRETER

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_a_step_without_numbers_is_reported_with_what_came_before[8-streamed]",
            "test_a_kernel_that_gave_up_is_named_instead_of_the_model",
            "test_a_step_of_a_loop_of_ones_own_is_checked",
            "test_a_step_that_is_traced_cannot_be_checked",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CONFIG = dataclasses.replace(TINY, tied_embeddings=False)
PROMPT = [7, 3, 41]
# Drawn, so that tokens do not repeat after a few.
DRAWN = {"temperature": 1.0, "seed": [3, 4]}


def made(*, embed=None, head=None, value=math.nan) -> Transformer:
    """A model that is whole but for a row of its embedding or its head."""
    model = Transformer(CONFIG, rngs=nnx.Rngs(1), dtype=jnp.float32)
    if embed is not None:
        model.embed[...] = model.embed[...].at[embed].set(value)
    if head is not None and model.head is not None:
        model.head[...] = model.head[...].at[head].set(value)
    return model


def streamed(*args, **options):
    """As `generate`, by way of a stream that is read to its end."""
    steps = stream(*args, **options)
    came: list[list[int]] = [[] for _ in steps.output.tokens]
    try:
        for row in steps:
            for mine, token in zip(came, row, strict=True):
                mine += [] if token is None else [token]
    finally:
        assert steps.output.tokens == came
        assert next(steps, None) is None  # there is no going on
    return steps.output


both = pytest.mark.parametrize("run", [generate, streamed])


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prefill_without_numbers_chooses_no_token(run, temperature, value):
    # The last row alone: every other logit is a number.
    model = made(head=256, value=value)
    with pytest.raises(FloatingPointError, match=r"sequence 0 were NaN.*after 0 new tokens") as e:
        run(model, PROMPT, 20, temperature=temperature)
    assert "`ffjax doctor MODEL` finds the tensor" in str(e.value)
    assert isinstance(e.value, NotFiniteError)
    assert (e.value.sequence, e.value.count) == (0, 0)
    assert e.value.output is not None
    assert e.value.output.tokens == [[]]


@functools.cache
def whole(count):
    return generate(made(), [PROMPT, PROMPT[:2]], count, **DRAWN).tokens


def first_seen(tokens, i, *others):
    """Whether the i-th token has not come before it, nor elsewhere."""
    return tokens[i] not in [*PROMPT, *tokens[:i], *others]


@pytest.mark.drawn("Each place, by one of the functions.")
@both
@pytest.mark.parametrize("least", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK])
def test_a_step_without_numbers_is_reported_with_what_came_before(run, least):
    """A token whose embedding is NaN: feeding it leaves no number."""
    rows, other = whole(40)
    at = next(i for i in range(least, 30) if first_seen(rows, i, *other[: i + 2]))
    model = made(embed=rows[at])
    with pytest.raises(NotFiniteError, match=f"after {at + 1} new token") as e:
        run(model, [PROMPT[:2], PROMPT], 40, temperature=1.0, seed=[4, 3])
    assert (e.value.sequence, e.value.count) == (1, at + 1)
    output = e.value.output
    assert output is not None
    assert output.tokens == [other[: at + 1], rows[: at + 1]]
    assert output.finish_reasons == [None, None]


@both
def test_a_kernel_that_gave_up_is_named_instead_of_the_model(run, monkeypatch):
    monkeypatch.setattr(Loop, "fault", lambda loop: "A decode step gave up in layer 0.")
    with pytest.raises(NotFiniteError, match=r"none\. A decode step gave up in layer 0\. That is"):
        run(made(head=3), PROMPT, 20)


def test_a_cache_without_a_record_tells_of_no_fault(monkeypatch):
    config = small_config(num_layers=1)
    model, cache = random_decode_model(config), filled_cache(config, [3, 1], 8)
    assert step_fault(model, cache) is None  # on a CPU nothing gives up
    monkeypatch.setattr("ffjax.decode.Gpu.of", lambda device: INTERPRETER)
    assert step_fault(model, cache) is None
    counters = jnp.full_like(cache.counters, 1)
    assert "A decode step gave up in " in str(
        step_fault(model, dataclasses.replace(cache, counters=counters))
    )


@both
def test_what_a_sequence_says_after_its_end_may_be_anything(run):
    """The stop token's embedding is NaN, and it is fed: that sequence has ended."""
    rows, other = whole(40)
    at = next(i for i in range(2, 30) if first_seen(rows, i, *other))
    out = run(made(embed=rows[at]), [PROMPT, PROMPT[:2]], 40, stop_token=rows[at], **DRAWN)
    assert out.tokens == [rows[:at], other]
    assert out.finish_reasons == ["stop", "length"]


def test_the_device_stops_when_no_sequence_has_numbers():
    [rows] = generate(made(), [PROMPT], 300, temperature=1.0, seed=[3]).tokens
    at = next(i for i in range(3, 300) if first_seen(rows, i))
    stops = [i for i in range(257) if i not in rows][:64]  # no room for ids that stop none
    assert len(stops) == 64
    with pytest.raises(NotFiniteError) as e:
        generate(made(embed=rows[at]), PROMPT, 300, temperature=1.0, seed=[3], stop_token=stops)
    assert e.value.output is not None
    assert e.value.output.steps == -(-(at + 1) // BLOCK) * BLOCK < 300


STEPS = {
    "reference": functools.partial(decode_step, implementation="xla"),
    "fused": functools.partial(fused_step, interpret=True),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_steps_token_is_marked_whoever_chose_it(step):
    config = small_config(num_layers=1, tied_embeddings=False)
    model = nnx.clone(random_decode_model(config))
    graph, params = nnx.split(model)
    cache, tokens = filled_cache(config, [3, 1], 8), random_tokens(config, 2)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params):
        out = step(nnx.merge(graph, params), cache, tokens)
        return out.token, mark(out.logits, out.token)

    plain, marked = run(params)
    assert plain.tolist() == marked.tolist()
    assert model.head is not None
    # A token with others before and after it.
    model.head[...] = model.head[...].at[57].set(math.nan)
    assert run(nnx.state(model))[1].tolist() == [NOT_FINITE] * 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    [rows] = generate(_bytes_model(), [[120]], 12).tokens
    at = next(i for i in range(len(rows)) if rows[i] != 120 and rows[i] not in rows[:i])
    folder = tmp_path_factory.mktemp("models") / "broken"
    checkpoints.save(_bytes_model(rows[at]), folder)
    return str(folder), rows[: at + 1]


def _bytes_model(embed=None):
    model = Transformer(CONFIG, rngs=nnx.Rngs(2))
    if embed is not None:
        model.embed[...] = model.embed[...].at[embed].set(math.nan)
    return model


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_command_says_so_and_ends_with_code_1(path, capsys, more):
    folder, before = path
    asked = ["generate", "--model", folder, "--prompt", "x", "--max-new-tokens", "12"]
    assert main([*asked, *more]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("ffjax generate: Logits must be finite; those of sequence 0 ")
    assert f"after {len(before)} new token" in err
    assert "Traceback" not in err
    said = ByteTokenizer().decode(before)
    if not more:
        assert out == f"x{said}\n"
        return
    report = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert (report["text"], report["tokens"]) == (said, before)
    assert report["finish_reason"] == "not_finite"


def test_json_of_a_prefill_without_numbers_has_no_token(tmp_path, capsys):
    model = _bytes_model()
    assert model.head is not None
    model.head[...] = model.head[...].at[9].set(math.nan)
    checkpoints.save(model, tmp_path / "broken")
    assert main(["generate", "--model", str(tmp_path / "broken"), "--prompt", "x", "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert (report["text"], report["tokens"]) == ("", [])
    assert (report["finish_reason"], report["tokens_per_second"]) == ("not_finite", None)
    assert "after 0 new tokens" in err


def test_the_command_writes_null_for_a_rate_that_nobody_timed(capsys):
    assert main(["generate", "--prompt", "x", "--max-new-tokens", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert report["tokens_per_second"] is None
    assert report["decode_seconds"] == 0
    assert main(["generate", "--prompt", "x", "--max-new-tokens", "1"]) == 0
    assert "1 token, prefill " in (err := capsys.readouterr().err)
    assert "no decode steps with" in err


# A loop of one's own


def test_a_step_of_a_loop_of_ones_own_is_checked():
    tokens = jnp.int32([7, 3])
    for broken, raises in ((made(), None), (made(embed=3), 1), (made(head=9), 0)):
        cache = filled_cache(CONFIG, [2, 4], 8)
        cache = dataclasses.replace(
            cache, k=cache.k.astype(jnp.float32), v=cache.v.astype(jnp.float32)
        )
        out = jax.jit(decode_step)(broken, cache, tokens)
        if raises is None:
            out.check(broken)
            continue
        with pytest.raises(NotFiniteError, match="or infinite, so they choose none") as error:
            out.check(broken)
        assert error.value.sequence == raises
        assert error.value.count is None


def test_a_full_cache_is_no_fault():
    model, cache = made(), KVCache.create(CONFIG, 2, 8, jnp.float32)
    cache = dataclasses.replace(cache, lengths=jnp.int32([8, 3]))
    out = jax.jit(decode_step)(model, cache, jnp.int32([7, 3]))
    assert jnp.isnan(out.logits[0]).all()
    out.check(model)


def test_a_step_that_is_traced_cannot_be_checked():
    model, cache = made(), KVCache.create(CONFIG, 1, 8, jnp.float32)

    def step(cache):
        out = decode_step(model, cache, jnp.int32([7]))
        out.check(model)
        return out

    with pytest.raises(TypeError, match="Call check outside of jit"):
        jax.jit(step)(cache)
