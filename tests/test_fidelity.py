"""The fidelity gate: its arithmetic, what it lets pass, and the fused kernel before it."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_folders import write_folder
from hf_models import MODELS
from test_hf_tokenizer import write as write_tokenizer

import checkpoints
from ffjax import fidelity
from ffjax.cache import KVCache
from ffjax.cli import main
from ffjax.config import PRESETS, ModelConfig, preset
from ffjax.decode import (
    DecodeOutput,
    Implementation,
    Kernel,
    backend_of,
    fused_step,
    reference_step,
)
from ffjax.fidelity import (
    Candidate,
    Comparison,
    Estimate,
    Fidelity,
    compare,
    kl_divergence,
    measure,
    upper_bound,
)
from ffjax.formats import WeightFormats
from ffjax.hf_tokenizer import HFTokenizer
from ffjax.model import Transformer
from ffjax.quantization import Kind, named_format, quantize, quantized_config
from ffjax.stdlib_text import Source, is_held_out, read_sources
from pallas_kernels.backends import why_not_backend
from pallas_kernels.gpu import Gpu

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_kl_divergence_of_known_distributions",
            "test_the_command_prints_an_aligned_table",
            "test_bad_input_is_a_sentence_and_code_2",
        ],
    ),
    pytest.mark.filterwarnings(
        # JAX 0.11 says so of every kernel of this backend; the project pins the versions that
        # have it.
        "error",
        "ignore:The Pallas Triton backend:DeprecationWarning",
    ),
]

CONFIG = ModelConfig(
    name="tiny-bytes",
    vocab_size=257,
    num_layers=2,
    model_dim=24,
    ffw_dim=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_context=64,
)
# One shape almost everywhere, and the same model: few programs to compile.
PROMPTS, TOKENS = 4, 4


@pytest.fixture(scope="module")
def model() -> Transformer:
    return fidelity.random_model(CONFIG)


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    return fidelity.random_prompts(CONFIG, PROMPTS, TOKENS)


# Candidates


def sharper(model: Transformer, cache: KVCache, tokens: jax.Array) -> DecodeOutput:
    """Too sure of itself: clearly further from float32 than any rounding."""
    out = reference_step(model, cache, tokens)
    return out._replace(logits=1.5 * out.logits)


def broken(model: Transformer, cache: KVCache, tokens: jax.Array) -> DecodeOutput:
    """One logit of one prompt at one position is NaN; everything else is exact."""
    out = exact(model, cache, tokens)
    hit = (tokens[0] == 7) & (cache.lengths[0] == 2)
    logit = jnp.where(hit, jnp.nan, out.logits[0, 50])
    return out._replace(logits=out.logits.at[0, 50].set(logit))


def in_dtype(cache: KVCache, dtype) -> KVCache:
    return dataclasses.replace(cache, k=cache.k.astype(dtype), v=cache.v.astype(dtype))


def exact(model: Transformer, cache: KVCache, tokens: jax.Array) -> DecodeOutput:
    """Float32 throughout, but for the keys and values that a bfloat16 cache can hold."""
    out = reference_step(fidelity.upcast(model), in_dtype(cache, jnp.float32), tokens)
    return out._replace(cache=in_dtype(out.cache, jnp.bfloat16))


def forgetful(model: Transformer, cache: KVCache, tokens: jax.Array) -> DecodeOutput:
    """Sees no token but the last: its cache is emptied at every step."""
    out = reference_step(model, cache, tokens)
    emptied = dataclasses.replace(out.cache, lengths=jnp.zeros_like(out.cache.lengths))
    return out._replace(cache=emptied)


# The metrics


def test_kl_divergence_of_known_distributions():
    p, q = np.array([0.5, 0.5, 0.0625]), np.array([0.25, 0.75, 0.0625])
    p, q = p / p.sum(), q / q.sum()
    expected = (p * np.log(p / q)).sum()
    # Logits are known up to a constant.
    got = kl_divergence(np.log(p) + 3, np.log(q) - 5)
    assert got == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(np.log(q), np.log(p)) != pytest.approx(expected, rel=0.01)
    assert kl_divergence(np.log(p), np.log(p)) == 0
    rows = kl_divergence(np.log([[p, q], [q, p]]), np.log([[p, p], [p, p]]))
    assert rows.shape == (2, 2)
    assert rows[0, 1] == rows[1, 0] > 0 == rows[0, 0]


def test_kl_divergence_sees_what_float32_would_round_away():
    difference = np.float32(1e-5)
    reference = np.zeros(2, np.float32)
    got = kl_divergence(reference, np.array([difference, 0], np.float32))
    assert got == pytest.approx(np.float64(difference) ** 2 / 8, rel=1e-4)


def test_huge_logits_do_not_overflow():
    logits = np.array([2e4, 0.0], np.float32)
    assert kl_divergence(logits, logits[::-1]) == pytest.approx(2e4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_divergence(value):
    fine = np.zeros((2, 3))
    bad = fine.copy()
    bad[1, 2] = value
    for pair in ((fine, bad), (bad, fine)):
        got = kl_divergence(*pair)
        assert got[0] == 0
        assert math.isnan(got[1])


def test_negative_log_likelihood_is_of_the_target():
    p = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
    got = fidelity.negative_log_likelihood(np.log(p) + 2, np.array([1, 2]))
    assert got == pytest.approx(-np.log([0.25, 0.75]), rel=1e-12)


# The bootstrap


def test_the_bound_of_three_values_by_hand():
    # Of 0, 0, 3 the mean of three draws is how often 3 is drawn: 0 to 3 times with
    # probabilities 8, 12, 6 and 1 of 27. Up to twice: 26/27 = 0.963; up to once: 20/27.
    assert upper_bound(np.array([0.0, 3.0, 0.0])) == 2
    # Of two values the larger is drawn twice with probability 1/4.
    assert upper_bound(np.array([-1.0, 5.0])) == 5
    assert upper_bound(np.array([0.25, 0.25])) == 0.25


def test_the_bound_is_one_sided_and_that_of_many_resamples():
    rng = np.random.default_rng(5)
    for _ in range(8):
        values = rng.normal(2.0, 1.0, 400)
        normal = values.mean() + 1.645 * values.std() / math.sqrt(len(values))
        assert upper_bound(values) == pytest.approx(normal, abs=0.005)
        assert upper_bound(values) == upper_bound(values.copy())


def test_one_prompt_is_too_few_for_a_bootstrap():
    with pytest.raises(ValueError, match="needs at least 2 of them, got 1"):
        upper_bound(np.array([1.0]))


def test_differences_are_taken_prompt_by_prompt():
    baseline = np.random.default_rng(0).lognormal(size=16)  # prompts differ widely
    candidate = 0.98 * baseline  # and the candidate is better on each, by little
    paired = compare(candidate, baseline)
    assert paired.passed
    assert paired.difference.mean == pytest.approx(-0.02 * baseline.mean())
    assert paired.candidate.upper == pytest.approx(0.98 * paired.baseline.upper)
    shuffled = compare(np.roll(candidate, 1), baseline)
    assert shuffled.difference.mean == pytest.approx(paired.difference.mean)
    assert shuffled.difference.upper > 0 > paired.difference.upper
    assert not shuffled.passed
    with pytest.raises(ValueError, match=r"one number a prompt.*\(16,\) and \(15,\)"):
        compare(candidate, baseline[1:])


def test_the_bound_has_to_hold_as_well_as_the_mean():
    baseline = np.ones(16)
    wavering = baseline + np.array([-1.0, 0.9] * 8)
    result = compare(wavering, baseline)
    assert result.difference.mean < 0 < result.difference.upper
    assert not result.passed
    assert compare(baseline, baseline).passed
    assert not compare(baseline + 1e-12, baseline).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["candidate", "baseline", "both"])
def test_what_is_not_finite_never_passes(value, where):
    arrays = {"candidate": np.zeros(16), "baseline": np.ones(16)}
    for name in arrays if where == "both" else [where]:
        arrays[name][3] = value
    assert not compare(**arrays).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_bound(value):
    # Most resamples of 16 values contain a given one, and a third do not.
    assert math.isnan(upper_bound(np.array([value, *[0.0] * 15])))
    fine = Estimate(-1.0, -1.0)
    assert Comparison(fine, fine, fine).passed
    for field in range(3):
        figures = [fine, fine, fine]
        figures[field] = Estimate(-1.0, value)
        assert not Comparison(*figures).passed


def test_the_gate_takes_both_metrics():
    good, bad = (compare(np.full(4, x), np.full(4, 2.0)) for x in (1.0, 3.0))
    for kl in (good, bad):
        for nll in (good, bad):
            assert Fidelity(kl, nll, 1.0).passed == (kl is good and nll is good)


# The measurement


@functools.cache
def whole(dtype: str) -> np.ndarray:
    """Logits of all prompts without a cache: float64 `[n, T, V]`."""
    model = fidelity.random_model(CONFIG)
    model = fidelity.upcast(model) if dtype == "float32" else model
    logits = model(jnp.asarray(fidelity.random_prompts(CONFIG, PROMPTS, TOKENS)[:, :-1]))
    return np.asarray(logits, np.float64)


def log_probs(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_a_worse_candidate_fails_by_as_much_as_an_independent_sum_says(model, prompts):
    # Not a multiple of the batch: the last one is smaller.
    result = measure(model, prompts, sharper, batch=3)
    assert not result.passed
    assert not result.kl.passed
    assert not result.nll.passed
    p, q = log_probs(whole("float32")), log_probs(1.5 * whole("bfloat16"))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean(axis=1)
    nll = np.zeros((2, PROMPTS, TOKENS))
    for i in range(PROMPTS):
        for t in range(TOKENS):
            nll[:, i, t] = -p[i, t, prompts[i, t + 1]], -q[i, t, prompts[i, t + 1]]
    apart = np.abs(nll[1] - nll[0]).mean(axis=1)
    # Rounding moves the logits by a hundredth, sharpening by a half.
    assert result.kl.candidate.mean == pytest.approx(kl.mean(), rel=0.03)
    assert result.kl.candidate.upper == pytest.approx(upper_bound(kl), rel=0.03)
    assert result.nll.candidate.mean == pytest.approx(apart.mean(), rel=0.03)
    assert result.nll.candidate.upper == pytest.approx(upper_bound(apart), rel=0.03)
    assert result.reference_nll == pytest.approx(nll[0].mean(), rel=1e-5)
    # The baseline is bfloat16, close by and not the reference itself.
    assert 1e-7 < result.kl.baseline.mean < result.kl.candidate.mean / 100


def test_the_baseline_as_candidate_passes_with_no_difference(model, prompts):
    result = measure(model, prompts, reference_step)
    assert result.passed
    assert result.kl.difference == result.nll.difference == (0, 0)
    assert result.kl.baseline.mean > 0


def test_a_candidate_closer_to_float32_passes(model, prompts):
    result = measure(model, prompts, exact)
    assert result.passed
    assert result.kl.difference.upper < 0
    # The cache is what it still rounds.
    assert 0 < result.kl.candidate.mean < result.kl.baseline.mean / 2


def test_everybody_has_a_cache_of_their_own(model, prompts):
    alone = measure(model, prompts, reference_step)
    result = measure(model, prompts, forgetful)
    assert not result.passed
    assert result.kl.candidate.mean > 10 * result.kl.baseline.mean
    assert (result.kl.baseline, result.nll.baseline) == (alone.kl.baseline, alone.nll.baseline)
    assert result.reference_nll == alone.reference_nll


def test_one_logit_that_is_nan_fails_the_gate(model, prompts):
    fed = prompts.copy()
    fed[0, 2] = 7
    result = measure(model, fed, broken)
    assert not result.passed
    assert math.isnan(result.kl.difference.mean)
    assert not result.nll.passed
    assert math.isfinite(result.kl.baseline.mean)
    assert math.isfinite(result.reference_nll)


def test_steps_are_reported_as_they_are_made(model, prompts):
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    measure(model, prompts, reference_step, progress=progress)
    assert len(seen) == TOKENS


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p[0], r"integers \[n, T \+ 1\].*shape \[5\]"),
        (lambda p: p[:, :1], r"the last token is only predicted.*\[4, 1\]"),
        (lambda p: p.astype(float), "integers.*float64"),
        (lambda p: p[:1], "at least 2 prompts, got 1"),
        (lambda p: p + 250, "ids of tiny-bytes are 0 to 256"),
        (lambda p: p - 250, "ids of tiny-bytes are 0 to 256"),
        (lambda p: np.tile(p, 14), "A prompt of 69 steps.*tiny-bytes was made for 64"),
    ],
)
def test_impossible_prompts_are_refused(model, prompts, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(model, change(prompts), reference_step)


def test_other_weights_and_batches_are_refused(model, prompts):
    with pytest.raises(TypeError, match=r"these are float32\. Load the model with dtype"):
        measure(fidelity.upcast(model), prompts, reference_step)
    with pytest.raises(ValueError, match="at least one prompt, got batch=0"):
        measure(model, prompts, reference_step, batch=0)


# What is measured


def test_upcast_weights_are_the_same_numbers(model):
    wide = fidelity.upcast(model)
    assert wide.dtype == jnp.float32
    assert model.dtype == jnp.bfloat16
    for a, b in zip(*map(jax.tree.leaves, map(nnx.state, (model, wide))), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), b)


def test_random_weights_are_the_models_own_with_norms_around_one(model):
    plain = nnx.to_flat_state(nnx.state(nnx.jit(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))()))
    norms = []
    for (path, got), (_, want) in zip(nnx.to_flat_state(nnx.state(model)), plain, strict=True):
        got, want = (np.asarray(x[...], np.float32) for x in (got, want))
        if "norm" in str(path[-1]):
            assert 0.5 <= got.min() < 0.6 < 1.4 < got.max() <= 1.5
            norms.append(got.reshape(-1)[:24])
        else:
            np.testing.assert_array_equal(got, want)
    assert len(norms) == 3
    assert len({norm.tobytes() for norm in norms}) == 3


def test_random_weights_neither_know_the_next_token_nor_find_all_equal(model):
    entropy = -(np.exp(p := log_probs(whole("float32"))) * p).sum(axis=-1)
    assert 0.5 * math.log(257) < entropy.mean() < 0.98 * math.log(257)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """A Hugging Face folder whose tokenizer puts BOS, id 0, before a text."""
    model = MODELS["tied"]
    sized = type(model)(5, {**model.settings, "vocab_size": 280, "num_hidden_layers": 1})
    folder = write_folder(tmp_path_factory.mktemp("hf") / "talker", sized, eos_token_id=1)
    return write_tokenizer(folder)


FILES = [Source("a.py", bytes(range(10))), Source("b.py", bytes(range(50, 74))), Source("c", b"x")]


def test_held_out_prompts_are_whole_pieces_each_file_before_any_twice():
    pieces = {bytes(range(5)), bytes(range(5, 10))}
    pieces |= {bytes(range(at, at + 5)) for at in (50, 55, 60, 65)}
    drawn = set()
    for seed in range(20):
        got = fidelity.held_out_prompts(6, 4, seed, held_out=FILES)
        assert {bytes(row.tolist()) for row in got} == pieces
        assert sorted(row[0] >= 50 for row in got[:2]) == [False, True]
        assert sorted(row[0] >= 50 for row in got[2:4]) == [False, True]
        np.testing.assert_array_equal(
            got[:3], fidelity.held_out_prompts(3, 4, seed, held_out=FILES)
        )
        drawn.add(got.tobytes())
    assert len(drawn) > 10
    with pytest.raises(ValueError, match="have 6 pieces of 5 bytes; 7 were asked for"):
        fidelity.held_out_prompts(7, 4, held_out=FILES)
    with pytest.raises(ValueError, match="got 7 prompts of 0 tokens"):
        fidelity.held_out_prompts(7, 0, held_out=FILES)


def test_held_out_prompts_in_a_models_own_tokens(talker):
    tokenizer = HFTokenizer.read(talker)
    texts = [f"hello world, return {name}: the hello\n" * 9 for name in "ab"]
    files = [Source(name, text.encode()) for name, text in zip("ab", texts, strict=True)]
    files.append(Source("old.py", b"caf\xe9 hello return hello"))  # not UTF-8
    whole = [tokenizer.split(file.text.decode("utf-8", "replace"))[1] for file in files]
    pieces = {tuple(own[at : at + 7]) for own in whole for at in range(0, len(own) - 6, 7)}
    count = sum(len(own) // 7 for own in whole)
    got = fidelity.held_out_prompts(count, 7, tokenizer=tokenizer, held_out=files)
    assert got.shape == (count, 8)
    assert set(got[:, 0].tolist()) == {0}  # BOS
    assert {tuple(row[1:]) for row in got.tolist()} == pieces
    with pytest.raises(ValueError, match=f"have {count} pieces of 8 tokens; 999 were asked for"):
        fidelity.held_out_prompts(999, 7, tokenizer=tokenizer, held_out=files)


def test_held_out_prompts_come_from_files_that_training_kept_out():
    trained, held_out = read_sources()
    assert all(is_held_out(source.name) for source in held_out)
    found = set()
    for row in fidelity.held_out_prompts(16, 256):
        piece = bytes(row.tolist())
        assert not any(piece in source.text for source in trained)
        found.add(next(source.name for source in held_out if piece in source.text))
    assert len(found) == 16


def test_random_prompts_use_the_whole_vocabulary():
    drawn = fidelity.random_prompts(CONFIG, 100, 100, seed=1)
    assert drawn.shape == (100, 101)
    assert sorted(set(drawn.ravel().tolist())) == list(range(257))
    assert (drawn != fidelity.random_prompts(CONFIG, 100, 100, seed=2)).any()
    with pytest.raises(ValueError, match="got 0 prompts of 3 tokens"):
        fidelity.random_prompts(CONFIG, 0, 3)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr("ffjax.decode.why_not_fused_config", lambda *_: "There is no GPU.")


def test_without_a_gpu_a_small_model_is_interpreted_and_a_large_one_refused(without_gpu):
    chosen = fidelity.choose_candidate(preset("python-bytes-3m"), 2, 8)
    assert (chosen.implementation, chosen.why_interpreted) == ("pallas", "There is no GPU.")
    with pytest.raises(NotImplementedError, match=r"^There is no GPU\. Nor .*1235814400 weights"):
        fidelity.choose_candidate(preset("llama3.2-1b"), 2, 8)
    with pytest.raises(NotImplementedError, match="There is no GPU"):
        fidelity.choose_candidate(CONFIG, 2, 8, "pallas")


def test_every_family_is_interpreted(without_gpu):
    chosen = fidelity.choose_candidate(dataclasses.replace(CONFIG, qk_norm="head"), 2, 8)
    assert chosen.implementation == "pallas"
    assert isinstance(chosen.step, functools.partial)
    assert chosen.step.keywords == {"interpret": True}


def test_a_named_candidate_is_that_one(model, monkeypatch):
    chosen = fidelity.choose_candidate(CONFIG, 2, 8, "xla")
    assert (chosen.implementation, chosen.why_interpreted) == ("xla", None)
    out = chosen.step(model, KVCache.create(CONFIG, 2, 8), jnp.array([1, 2]))
    assert out.logits.shape == (2, 257)
    with pytest.raises(ValueError, match="'cuda'"):
        fidelity.choose_candidate(CONFIG, 2, 8, "cuda")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("ffjax.decode.why_not_fused_config", lambda *_: None)
    names: list[Implementation | None] = [None, "pallas"]
    for name in names:
        chosen = fidelity.choose_candidate(CONFIG, 2, 8, name)
        assert (chosen.implementation, chosen.why_interpreted) == ("pallas", None)
        assert chosen.step is fused_step


# The command


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> str:
    """The tiny model, saved in float32: the gate reads it in bfloat16."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    checkpoints.save(fidelity.upcast(model), path)
    return str(path)


ARGUMENTS = ["fidelity", "--prompts", "4", "--tokens", "4"]


def test_the_command_prints_an_aligned_table(path, capsys):
    assert main([*ARGUMENTS, "--model", path, "--implementation", "xla"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "tiny-bytes, trained weights: 4 prompts of 4 tokens, 4 side by side, on " in out
    header = next(line for line in out.splitlines() if "upper 95% bound" in line)
    rows = [line for line in out.splitlines() if line.startswith("  ")]
    assert len(rows) == 6
    ends = [header.index(name) + len(name) for name in ("mean", "upper 95% bound")]
    for row in rows:
        figures = [row[end - 9 : end] for end in ends]
        assert all(re.fullmatch(r"\d\.\d{3}e[+-]\d\d", figure) for figure in figures), row
    assert [row.split()[-1] for row in rows if "passes" in row] == ["passes"] * 2
    assert out.endswith("The gate passes.\n")


def test_json_is_one_object_with_every_figure(path, capsys, monkeypatch):
    batches = []

    def noted(*arguments, **options):
        batches.append(options["batch"])
        return measure(*arguments, **options)

    monkeypatch.setattr(fidelity, "measure", noted)
    arguments = [*ARGUMENTS, "--model", path, "--implementation", "xla", "--batch", "3"]
    assert main([*arguments, "--seed", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["passed"] is True
    assert (report["model"], report["weights"]) == ("tiny-bytes", "trained")
    assert (report["implementation"], report["interpreted"]) == ("xla", False)
    assert [report[name] for name in ("prompts", "tokens", "batch", "seed")] == [4, 4, 3, 5]
    assert batches == [3]
    assert report["device"]
    assert report["seconds"] > 0
    model = checkpoints.load(path, dtype=jnp.bfloat16)
    expected = measure(model, fidelity.held_out_prompts(4, 4, 5), reference_step, batch=3)
    assert report["reference_nll"] == pytest.approx(expected.reference_nll, rel=1e-6)
    for name, comparison in (("kl", expected.kl), ("nll", expected.nll)):
        got = report[name]
        assert got["passed"] is True
        assert got["difference"] == {"mean": 0, "upper": 0}
        for who in ("candidate", "baseline"):
            assert got[who] == pytest.approx(comparison.baseline._asdict(), rel=1e-4)


def test_the_command_feeds_a_checkpoint_its_own_tokens(talker, tmp_path, capsys):
    checkpoints.convert_hf(talker, tmp_path / "ours")
    tokenizer = HFTokenizer.read(talker)
    prompts = fidelity.held_out_prompts(4, 4, 5, tokenizer=tokenizer)
    model = checkpoints.load(talker)
    expected = measure(model, prompts, reference_step, batch=4)
    assert (prompts[:, 0] == 0).all()
    for path in (talker, tmp_path / "ours"):
        arguments = [*ARGUMENTS, "--model", str(path), "--implementation", "xla", "--seed", "5"]
        assert main([*arguments, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["reference_nll"] == pytest.approx(expected.reference_nll, rel=1e-6)


def test_a_gate_that_fails_is_exit_code_1(path, capsys, monkeypatch):
    monkeypatch.setattr(fidelity, "choose_candidate", lambda *_: Candidate(sharper, "pallas"))
    assert main([*ARGUMENTS, "--model", path]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILS\n") == 2
    assert out.endswith("The gate FAILS.\n")


def test_nan_is_null_in_json_and_fails(path, capsys, monkeypatch):
    def nan(model, cache, tokens):
        out = reference_step(model, cache, tokens)
        return out._replace(logits=out.logits * jnp.nan)

    monkeypatch.setattr(fidelity, "choose_candidate", lambda *_: Candidate(nan, "pallas"))
    assert main([*ARGUMENTS, "--model", path, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is report["kl"]["passed"] is report["nll"]["passed"] is False
    assert report["kl"]["difference"] == {"mean": None, "upper": None}
    assert report["kl"]["baseline"]["mean"] > 0


def test_a_configuration_gets_random_weights_and_prompts(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    arguments = [*ARGUMENTS, "--config", "tiny", "--implementation", "xla", "--json"]
    assert main([*arguments, "--seed", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["weights"]) == ("tiny-bytes", "random")
    expected = measure(
        fidelity.random_model(CONFIG, 3), fidelity.random_prompts(CONFIG, 4, 4, 3), reference_step
    )
    assert report["reference_nll"] == pytest.approx(expected.reference_nll, rel=1e-6)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--prompts", "1"], "--prompts: a whole number from 2 is needed, got '1'."),
        (["--tokens", "0"], "--tokens: a whole number from 1 is needed, got '0'."),
        (["--tokens", "65"], "A prompt of 65 steps"),
        (["--seed", "-1"], "--seed: a whole number from 0 to 2^64 - 1 is needed, got '-1'."),
        (["--batch", "0"], "--batch: a whole number from 1 is needed, got '0'."),
        (["--model", "no/such/checkpoint"], "no/such/checkpoint"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(path, capsys, more, sentence):
    assert main([*ARGUMENTS, "--model", path, "--implementation", "xla", *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ffjax fidelity: ")
    assert sentence in err


def test_a_model_of_another_vocabulary_and_an_unknown_configuration_are_refused(tmp_path, capsys):
    words = dataclasses.replace(CONFIG, name="words", vocab_size=101)
    checkpoints.save(Transformer(words, rngs=nnx.Rngs(0)), tmp_path / "words")
    named = ["--implementation", "xla"]
    assert main([*ARGUMENTS, *named, "--model", str(tmp_path / "words")]) == 2
    assert "it needs a vocabulary of 257; words has 101" in capsys.readouterr().err
    assert main([*ARGUMENTS, *named, "--config", "llama9"]) == 2
    assert "No preset is called 'llama9'" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--model", "x", "--config", "llama3.2-1b"]) == 2
    assert "not allowed with" in capsys.readouterr().err


# The kernel


def test_the_interpreted_kernel_is_closer_to_float32_than_the_bfloat16_model(without_gpu, capsys):
    arguments = ["fidelity", "--prompts", "8", "--tokens", "3"]
    code = main(arguments)
    out, err = capsys.readouterr()
    print(out)
    assert "The candidate is the kernel's body, interpreted: There is no GPU." in err
    assert "fused kernel, interpreted" in out
    assert "nan" not in out
    # The likelihood of 24 tokens is too few for its bound: that metric may fail here.
    assert code in (0, 1)
    kl = next(line for line in out.splitlines() if line.startswith("  difference"))
    assert kl.endswith("passes"), out


def check_on_gpu(model: Transformer, prompts: np.ndarray, batch: int, kernel: Kernel) -> None:
    backend, gpu = backend_of(kernel), Gpu.of(jax.devices()[0])
    if backend is not None and (reason := why_not_backend(backend, gpu)) is not None:
        pytest.skip(reason)  # as with `--as-if a100`
    candidate = fidelity.choose_candidate(model.config, batch, prompts.shape[1] - 1, kernel)
    result = measure(model, prompts, candidate.step, batch=batch)
    print(result)
    assert math.isfinite(result.reference_nll)
    assert result.kl.baseline.mean > 0
    assert result.kl.passed, result.kl
    assert result.nll.passed, result.nll


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", get_args(Kernel))
@pytest.mark.parametrize(("batch", "count", "tokens"), [(1, 16, 200), (8, 32, 500)])
def test_the_kernel_passes_with_the_shipped_model_on_held_out_prompts(batch, count, tokens, kernel):
    model = checkpoints.load(checkpoints.SHIPPED_MODEL)
    check_on_gpu(model, fidelity.held_out_prompts(count, tokens), batch, kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", get_args(Kernel))
@pytest.mark.parametrize(("batch", "tokens"), [(1, 40), (8, 150)])
def test_the_kernel_passes_with_random_weights_of_a_billion(batch, tokens, kernel):
    config = preset("llama3.2-1b")
    model = fidelity.random_model(config)
    try:
        check_on_gpu(model, fidelity.random_prompts(config, 16, tokens), batch, kernel)
    finally:
        for array in jax.tree.leaves(nnx.state(model)):
            array.delete()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(("batch", "count", "tokens"), [(1, 16, 200), (8, 32, 500)])
def test_the_kernel_passes_with_the_shipped_model_quantized(batch, count, tokens, kind):
    model = quantize(checkpoints.load(checkpoints.SHIPPED_MODEL), kind)
    check_on_gpu(model, fidelity.held_out_prompts(count, tokens), batch, "pallas")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(("batch", "tokens"), [(1, 40), (8, 150)])
def test_the_kernel_passes_with_a_billion_random_integers(batch, tokens, kind):
    layers = WeightFormats.of_layers(named_format(kind))
    config = quantized_config(preset("llama3.2-1b"), layers)
    model = fidelity.random_model(config)
    try:
        prompts = fidelity.random_prompts(config, 16, tokens)
        check_on_gpu(model, prompts, batch, "pallas")
    finally:
        for array in jax.tree.leaves(nnx.state(model)):
            array.delete()


@pytest.mark.gpu
def test_the_command_runs_the_kernel_where_there_is_a_gpu(capsys):
    assert main(["fidelity", "--prompts", "16", "--tokens", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["implementation"], report["interpreted"]) == ("pallas", False)
