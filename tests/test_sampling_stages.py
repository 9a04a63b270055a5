"""Each stage of the choice of a token against numpy, at its edges, and in a generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generate_cases import TINY
from sampling_oracle import edited, kept, probabilities

from ffjax.generation import generate
from ffjax.model import Transformer
from ffjax.sampling.choose import NOT_FINITE, choose
from ffjax.sampling.draw import sequence_keys, step_keys, words_of
from ffjax.sampling.filters import filtered
from ffjax.sampling.history import History, fed, said
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Stages, rows_of
from ffjax.streaming import stream

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_filters_keep_what_their_definitions_keep[1.0-all three]",
            "test_draws_follow_the_distribution_of_numpy[asked0]",
            "test_greedy_answers_follow_the_edited_logits[padded-all]",
            "test_parameters_out_of_range_are_refused",
            "test_parameters_are_values",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

VOCAB = 41


def _logits(batch: int, seed: int = 5, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, vocab)).astype(np.float32) * 2


FILTERS = {
    "top-k 1": {"top_k": 1},
    "top-k 5": {"top_k": 5},
    "top-k all": {"top_k": VOCAB},
    "top-k beyond": {"top_k": 10**6},
    "top-p next to 0": {"top_p": 1e-7},
    "top-p 0.3": {"top_p": 0.3},
    "top-p 0.95": {"top_p": 0.95},
    "top-p next to 1": {"top_p": 1 - 2**-24},
    "min-p 0.2": {"min_p": 0.2},
    "min-p 1": {"min_p": 1.0},
    "top-k and top-p": {"top_k": 6, "top_p": 0.7},
    "all three": {"top_k": 12, "top_p": 0.9, "min_p": 0.04},
}


@pytest.mark.drawn("Each filter, and each temperature.")
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_filters_keep_what_their_definitions_keep(filters, temperature):
    params = SamplingParams(temperature=temperature, **filters)
    logits = _logits(20)
    logits[3] = 1.5  # all equal: all are kept
    logits[4, ::3] = logits[4].max()  # some equal ones at the top
    logits[5, 7:] = -np.inf  # forbidden by an earlier stage
    rows = rows_of([params] * 20, [()] * 20, words_of(0, 20), Stages.of([params]))
    if not params.filters:
        pytest.skip("keeps all by definition")
    out = np.asarray(filtered(jnp.asarray(logits), *rows[1:4]))
    for got, given in zip(out, logits, strict=True):
        want = kept(given.astype(np.float64), params)
        # At a border that float32 cannot see, either is right.
        sure = _sure(given.astype(np.float64), params)
        assert (np.isfinite(got) == (want & np.isfinite(given)))[sure].all()
        assert np.isfinite(got).any()
        assert (got[np.isfinite(got)] == given[np.isfinite(got)]).all()


def _sure(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Tokens whose keeping does not hang on the last bits."""

    def moved(by: float) -> np.ndarray:
        top_p = min(params.top_p * (1 + by), 1.0)
        min_p = min(params.min_p * (1 + by), 1.0)
        with np.errstate(invalid="ignore"):
            return kept(
                logits,
                SamplingParams(
                    temperature=params.temperature, top_k=params.top_k, top_p=top_p, min_p=min_p
                ),
            )

    return moved(1e-5) == moved(-1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.02, "temperature": 1.7},
        {"logit_bias": {2: 3.0, 5: -1.0}, "bad_token_ids": (0, 6)},
        {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    ],
)
def test_draws_follow_the_distribution_of_numpy(asked):
    params = SamplingParams(**{"temperature": 0.8, **asked})
    draws, vocab = 20_000, 9
    logits, prompt, answer = _logits(1, 1, vocab)[0], [1, 3], [3, 4, 4]
    stages = Stages.of([params])
    rows = rows_of([params] * draws, [()] * draws, words_of(3, draws), stages)
    history = History.empty(draws, vocab)
    for token in prompt:
        history = fed(history, jnp.arange(draws), jnp.full((draws,), token))
    for token in answer:
        history = said(history, jnp.full((draws,), token))
    keys = step_keys(sequence_keys(rows.seeds), 4)
    spread = jnp.broadcast_to(logits, (draws, vocab))
    choice = choose(spread, None, rows, keys, history, jnp.full((draws,), 3), stages)
    want = probabilities(edited(logits, params, prompt, answer), params)
    counts = np.bincount(np.asarray(choice.told), minlength=vocab)
    assert counts[want == 0].sum() == 0
    expected = draws * want[want > 0]
    # Pearson's chi-squared with 8 degrees of freedom is over 26.1 once in a thousand.
    assert ((counts[want > 0] - expected) ** 2 / expected).sum() < 26.1


EDITS = {
    "bias": {"logit_bias": {3: 100.0, 5: -2.5, 0: 0.25}},
    "forbidden": {"bad_token_ids": (1, 40, 7)},
    "repetition": {"repetition_penalty": 1.7},
    "less than 1": {"repetition_penalty": 0.5},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.75},
    "all": {
        "logit_bias": {4: 2.0},
        "bad_token_ids": (4, 5),
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
    },
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(TINY, rngs=nnx.Rngs(1), dtype=jnp.float32)


@pytest.mark.drawn("Each edit, in one of the ways.")
@pytest.mark.parametrize("asked", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("prefill", ["padded", "packed"])
def test_greedy_answers_follow_the_edited_logits(model, asked, prefill, monkeypatch):
    """Teacher-forced against the model's logits, with what numpy makes of them."""
    if prefill == "packed":  # interpreted here
        monkeypatch.setattr("ffjax.prefill.choice._why_not", lambda *_: None)
    params = SamplingParams(**asked, min_tokens=2)
    prompts = [[5, 9, 5, 30], [7] * 40]
    out = generate(model, prompts, 20, sampling=params, stop_token=[3, 9])
    for prompt, answer, reason in zip(prompts, out.tokens, out.stop_reasons, strict=True):
        logits = np.asarray(model(jnp.array([prompt + answer])))[0, len(prompt) - 1 :]
        chosen = answer + ([] if reason is None else [reason])
        for i, token in enumerate(chosen):
            want = edited(logits[i], params, prompt, answer[:i], (3, 9))
            top, second = np.sort(want)[:-3:-1]
            assert token == want.argmax() or top - second < 1e-4


def test_the_first_tokens_are_chosen_as_all_others(model):
    """A forbidden, a biased and a least length at the prefill's token too."""
    ways = [
        SamplingParams(bad_token_ids=(int(free),)) for free in _greedy(model, [[1, 2, 3]], 1)[0]
    ]
    [free] = _greedy(model, [[1, 2, 3]], 1)
    assert generate(model, [1, 2, 3], 1, sampling=ways[0]).tokens != [free]
    forced = SamplingParams(logit_bias={77: 1e4})
    assert generate(model, [1, 2, 3], 3, sampling=forced).tokens == [[77] * 3]
    early = SamplingParams(stop_token_ids=free, min_tokens=1)
    assert generate(model, [1, 2, 3], 3, sampling=early).tokens[0][0] != free[0]
    assert generate(model, [1, 2, 3], 3, sampling=early).finish_reasons in (["length"], ["stop"])


def _greedy(model, prompts, count):
    return generate(model, prompts, count).tokens


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=7, top_k=5, logprobs=2),
    SamplingParams(temperature=1.4, seed=7, top_p=0.5, repetition_penalty=1.3, max_tokens=6),
    SamplingParams(logit_bias={9: 2.0}, frequency_penalty=0.5, logprobs=0),
    SamplingParams(temperature=0.6, seed=2**64 - 1, min_p=0.2, bad_token_ids=(1,)),
]
PROMPTS = [[1, 2, 3], [250] * 35, [9], [4, 8, 15, 16, 23, 42], [100, 101]]


def test_each_sequence_has_parameters_of_its_own_and_gets_what_it_gets_alone(model):
    together = generate(model, PROMPTS, 14, sampling=MIXED)
    rows = stream(model, PROMPTS, 14, sampling=MIXED)
    for b, params in enumerate(MIXED):
        alone = generate(model, PROMPTS[b], 14, sampling=params)
        assert together.tokens[b] == alone.tokens[0], b
        assert together.finish_reasons[b] == alone.finish_reasons[0] == "length"
        assert len(together.tokens[b]) == (params.max_tokens or 14)
        told = together.logprobs[b]
        assert len(told) == (0 if params.logprobs is None else 14)
        assert [token for token, _ in zip(told, told, strict=True)] == told
        for mine, theirs in zip(told, alone.logprobs[0], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [t for t, _ in mine.top] == [t for t, _ in theirs.top]
            assert len(mine.top) == params.logprobs
    assert list(rows)
    assert rows.output.tokens == together.tokens
    assert rows.output.logprobs == together.logprobs


def test_log_probabilities_are_those_of_the_models_own_logits(model):
    params = SamplingParams(temperature=1.3, logprobs=4, bad_token_ids=(3,), top_k=30, seed=5)
    out = generate(model, [1, 2, 3], 12, sampling=params)
    [answer], [told] = out.tokens, out.logprobs
    logits = np.asarray(model(jnp.array([[1, 2, 3, *answer]])), np.float64)[0, 2:-1]
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for token, one, row in zip(answer, told, want, strict=True):
        assert one.logprob == pytest.approx(row[token], abs=1e-5)
        best = np.argsort(-row, kind="stable")[:4]
        assert [t for t, _ in one.top] == best.tolist()
        assert [p for _, p in one.top] == pytest.approx(row[best].tolist(), abs=1e-5)


def test_what_ended_a_sequence_is_said(model):
    [free] = _greedy(model, [[1, 2, 3]], 12)
    own = SamplingParams(stop_token_ids=[free[4]])
    out = generate(model, [1, 2, 3], 12, sampling=own, stop_token=[256])
    at = free.index(free[4])
    assert out.tokens == [free[:at]]
    assert (out.finish_reasons, out.stop_reasons) == (["stop"], [free[4]])
    eos = generate(model, [1, 2, 3], 12, stop_token=[free[4]])
    assert (eos.tokens, eos.stop_reasons) == (out.tokens, out.stop_reasons)
    ignored = SamplingParams(ignore_eos=True)
    out = generate(model, [1, 2, 3], 12, sampling=ignored, stop_token=[free[4]])
    assert (out.tokens, out.finish_reasons, out.stop_reasons) == ([free], ["length"], [None])


def test_a_reader_may_end_one_sequence_of_a_stream(model):
    prompts = [[1, 2, 3], [9]]
    steps = stream(model, prompts, 40)
    taken = []
    for i, row in enumerate(steps):
        taken.append(row)
        if i == 4:
            steps.stop(1, "a text")
            steps.stop(1, "another")  # it has ended
    assert all(row[1] is None for row in taken[5:])
    out = steps.output
    assert out.tokens == [_greedy(model, prompts, 40)[0], _greedy(model, prompts, 40)[1][:5]]
    assert out.stop_reasons == [None, "a text"]
    assert out.finish_reasons == ["length", "stop"]
    steps = stream(model, prompts, 100)
    next(steps)
    steps.stop(0)
    steps.stop(1)
    assert list(steps) == []


def _never_even(logits, before):
    return jnp.where(jnp.arange(logits.shape[-1]) % 2 == 0, -jnp.inf, logits)


def _nothing_twice(logits, before):
    return jnp.where(before.prompt | (before.counts > 0), -jnp.inf, logits)


def _by_length(logits, before):
    wanted = before.lengths[:, None] + 100
    return jnp.where(jnp.arange(logits.shape[-1]) == wanted, 1e6, logits)


def test_logits_processors_of_ones_own(model):
    prompts = [[1, 2, 3], [9, 9]]
    odd = generate(model, prompts, 20, logits_processors=_never_even).tokens
    assert all(token % 2 for row in odd for token in row)
    once = generate(model, prompts, 20, logits_processors=[_never_even, _nothing_twice]).tokens
    for prompt, row in zip(prompts, once, strict=True):
        assert len({*prompt, *row}) == len({*prompt}) + 20
    assert (
        generate(model, prompts, 11, logits_processors=_by_length).tokens
        == [[*range(100, 111)]] * 2
    )
    drawn = SamplingParams(temperature=1.0, top_k=3)
    out = generate(model, prompts, 20, sampling=drawn, logits_processors=_never_even)
    assert all(token % 2 for row in out.tokens for token in row)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("asked", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {}])
def test_logits_that_are_no_numbers_are_marked_behind_every_stage(value, asked):
    params = SamplingParams(temperature=1.0, repetition_penalty=1.1, **asked)
    logits = _logits(3)
    logits[1, 17] = value
    stages = Stages.of([params])
    rows = rows_of([params] * 3, [()] * 3, words_of(0, 3), stages)
    keys = step_keys(sequence_keys(rows.seeds), 0)
    history = History.empty(3, VOCAB)
    choice = choose(jnp.asarray(logits), None, rows, keys, history, jnp.zeros(3, int), stages)
    assert (np.asarray(choice.told) == NOT_FINITE).tolist() == [False, True, False]


def test_a_program_with_more_stages_chooses_the_same(model):
    """What a live batch relies on: stages that a sequence does not ask for change nothing."""
    params = [SamplingParams(), SamplingParams(temperature=0.9, top_p=0.7)]
    few = Stages.of(params)
    many = Stages(draws=True, filters=True, penalizes=True, edits=8, forbids_stops=True, logprobs=3)
    logits = jnp.asarray(_logits(2))
    seeds = words_of(4, 2)
    tokens = []
    for stages in (few, many):
        rows = rows_of(params, [(1,), ()], seeds, stages)
        keys = step_keys(sequence_keys(rows.seeds), 2)
        history = said(History.empty(2, VOCAB), jnp.array([3, 4]))
        tokens.append(choose(logits, None, rows, keys, history, jnp.ones(2, int), stages).token)
    assert tokens[0].tolist() == tokens[1].tolist()
    assert int(tokens[0][0]) == int(logits[0].argmax())


WRONG = [
    ({"temperature": -1}, ValueError, "temperature must be 0 .greedy. or a positive number"),
    ({"temperature": "1"}, TypeError, "temperature is a number, got '1'"),
    ({"temperature": True}, TypeError, "temperature is a number"),
    ({"temperature": np.nan}, ValueError, "temperature must be"),
    ({"top_p": 0}, ValueError, "top_p must be above 0, to 1 .off., got 0"),
    ({"top_p": 1.1}, ValueError, "top_p must be above 0"),
    ({"top_k": -2}, ValueError, "top_k must be at least -1, got -2"),
    ({"top_k": 2.5}, TypeError, "top_k is an integer, got 2.5"),
    ({"min_p": 2}, ValueError, "min_p must be from 0 .off. to 1"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be from 1e-6 to 1e6"),
    ({"repetition_penalty": 1e-46}, ValueError, "repetition_penalty must be from 1e-6 to 1e6"),
    ({"presence_penalty": np.inf}, ValueError, "presence_penalty must be from -1e6 to 1e6"),
    ({"frequency_penalty": -3e38}, ValueError, "frequency_penalty must be from -1e6 to 1e6"),
    ({"min_tokens": 2**31}, ValueError, "min_tokens must be at most 2147483647"),
    ({"logit_bias": {-1: 2}}, ValueError, "A token id of logit_bias must be at least 0"),
    ({"logit_bias": {1: "x"}}, TypeError, r"logit_bias\[1\] is a number"),
    ({"logit_bias": 3}, TypeError, "logit_bias maps token ids to numbers, got 3"),
    ({"bad_token_ids": "ab"}, TypeError, "bad_token_ids is a sequence of token ids"),
    ({"stop_token_ids": [1.5]}, TypeError, r"stop_token_ids\[0\] is an integer"),
    ({"stop_token_ids": range(65)}, ValueError, "up to 64 tokens; stop_token_ids has 65"),
    ({"stop": ["a", ""]}, ValueError, "at least one character"),
    ({"stop": [3]}, TypeError, "stop is a text or a sequence of texts, got 3"),
    ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
    ({"min_tokens": 4, "max_tokens": 3}, ValueError, "min_tokens is at most max_tokens, 3; got 4"),
    ({"logprobs": 21}, ValueError, "logprobs is None, or 0 to 20 alternatives; got 21"),
    ({"seed": 2**64}, ValueError, "A seed is an integer from 0"),
    ({"ignore_eos": 1}, TypeError, "ignore_eos is True or False"),
]


@pytest.mark.parametrize(("asked", "kind", "message"), WRONG)
def test_parameters_out_of_range_are_refused(asked, kind, message):
    with pytest.raises(kind, match=message):
        SamplingParams(**asked)


REFUSED = [
    ({"sampling": SamplingParams(), "temperature": 1.0}, ValueError, "temperature is given beside"),
    ({"sampling": [SamplingParams()]}, ValueError, "there are 1 for 2 prompts"),
    ({"sampling": [SamplingParams(), 3]}, TypeError, "got 3 at index 1"),
    ({"sampling": 3}, TypeError, "sampling is a SamplingParams, or a sequence"),
    ({"sampling": SamplingParams(stop="a")}, ValueError, "Use ffjax.Generator"),
    ({"sampling": SamplingParams(bad_token_ids=(257,))}, ValueError, "0 to 256; got 257"),
    ({"sampling": SamplingParams(bad_token_ids=range(257))}, ValueError, "forbids every token"),
    ({"sampling": SamplingParams(logit_bias={257: 1})}, ValueError, "0 to 256; got 257"),
    ({"logits_processors": [3]}, TypeError, "A logits processor is a function"),
]


@pytest.mark.parametrize(("asked", "kind", "message"), REFUSED)
def test_requests_that_do_not_fit_the_model_are_refused(model, asked, kind, message):
    with pytest.raises(kind, match=message):
        generate(model, [[1], [2]], 3, **asked)


def test_generation_config_is_read_as_transformers_reads_it():
    read = SamplingParams.from_generation_config
    assert read({}) == SamplingParams()
    # Without do_sample nothing is drawn.
    assert read({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}) == SamplingParams()
    llama = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 1}
    assert read(llama) == SamplingParams(temperature=0.6, top_p=0.9, top_k=50)
    assert read({"do_sample": True, "top_k": 0, "min_p": 0.1}) == SamplingParams(
        temperature=1.0, min_p=0.1
    )
    rest = {
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "min_new_tokens": 2,
        "suppress_tokens": [4],
        "bad_words_ids": [[5], [6, 7]],
        "top_k": None,
    }
    assert read(rest) == SamplingParams(
        repetition_penalty=1.05, max_tokens=2048, min_tokens=2, bad_token_ids=(4, 5)
    )
    with pytest.raises(ValueError, match="top_p must be"):
        read({"do_sample": True, "top_p": 7})


def test_numbers_as_large_as_they_may_be_reach_the_device(model):
    """None is refused by numpy after the checks."""
    params = SamplingParams(
        temperature=3e38,
        top_k=10**300,
        min_tokens=2**31 - 1,
        repetition_penalty=1e6,
        presence_penalty=-1e6,
        frequency_penalty=1e6,
        logit_bias={3: 3.4e38, 4: -3.4e38},
        stop_token_ids=(5,),
        seed=2**64 - 1,
    )
    assert generate(model, [1, 2], 4, sampling=params).finish_reasons == ["length"]


def test_parameters_are_values():
    one = SamplingParams(logit_bias={3: 1, 1: 2.0}, stop="x", top_k=-1)
    assert one == SamplingParams(logit_bias=((1, 2.0), (3, 1.0)), stop=("x",))
    assert hash(one) == hash(SamplingParams(logit_bias={1: 2, 3: 1}, stop=["x"]))
    assert jax.tree.leaves(one) == [one]
