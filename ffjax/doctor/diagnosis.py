"""Everything the doctor looks at, in one object, and a sentence for whatever is wrong."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from ffjax import environment
from ffjax.benchmark.bandwidth import Bandwidth
from ffjax.config import ModelConfig
from ffjax.doctor import selftest
from ffjax.doctor.activations import Activations, BadActivation, observe
from ffjax.doctor.choices import choices
from ffjax.doctor.weights import BadWeights, bad_weights
from ffjax.model import Transformer

__all__ = ["Diagnosis", "Patient", "diagnose"]

# About as many as the default text has bytes.
_MOST_IDS = 64


@dataclasses.dataclass(frozen=True)
class Patient:
    """The model that is looked at.

    Attributes:
        source: where it comes from, for the report.
        config: its configuration.
        dtype: of its weights.
        load: loads it; None where only its sizes are of interest, and weights are random.
        tokens: encodes a text for it, None where nothing is to be read. Where it cannot, ids
            spread evenly over the vocabulary are read instead.
    """

    source: str
    config: ModelConfig
    dtype: Any
    load: Callable[[], Transformer] | None = None
    tokens: Callable[[], list[int]] | None = None


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        versions: of what is installed, by distribution.
        platform: the machine.
        settings: environment variables.
        devices: of JAX; empty where it starts none.
        model: facts of the model.
        choices: what can run, batch by batch.
        weights: tensors that are not finite; None where weights are random.
        activations: what a text made of the model, or token ids; None likewise.
        read: what that was, in words; None likewise.
        unread: why it was no text, or None.
        trials: decode steps beside the reference's; None without a self-test.
        tried: whose weights those were, a sentence.
        bandwidth: likewise.
        wrong: a sentence for everything that is wrong; empty where all is well.
    """

    versions: dict[str, str]
    platform: dict[str, Any]
    settings: dict[str, str]
    devices: list[dict[str, Any]]
    model: dict[str, Any]
    choices: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    weights: list[BadWeights] | None = None
    activations: Activations | None = None
    read: str | None = None
    unread: str | None = None
    trials: list[selftest.Trial] | None = None
    tried: str | None = None
    bandwidth: Bandwidth | None = None
    wrong: list[str] = dataclasses.field(default_factory=list)


def diagnose(
    patient: Patient, *, self_test: bool = True, say: Callable[[str], None] = lambda text: None
) -> Diagnosis:
    """Looks at the machine, at the model, and at a few decode steps.

    Args:
        patient: the model.
        self_test: whether to run decode steps and measure memory's speed.
        say: is told what is being done.

    Raises:
        ValueError, OSError: the model cannot be loaded, or its tokenizer not be read.
    """
    facts = _facts(patient)
    try:
        devices = environment.devices()
    except (RuntimeError, AssertionError) as error:  # JAX has no platform of that name, or no GPU
        return dataclasses.replace(facts, wrong=[environment.no_device(error)])
    found = dataclasses.replace(
        facts, devices=devices, choices=choices(patient.config, patient.dtype)
    )
    wrong = _idle_gpu(devices)
    model = None
    if patient.load is not None:
        say("reads the weights")
        model = patient.load()
        found = dataclasses.replace(found, weights=bad_weights(model))
        wrong += _of_weights(found.weights or [])
        if patient.tokens is not None:
            read, unread = "the text", None
            try:
                tokens = patient.tokens()
            except (ValueError, NotImplementedError) as error:
                read, unread = "token ids spread evenly over the vocabulary", str(error)
                tokens = _spread_ids(patient.config)
            say(f"runs the reference over {read}")
            found = dataclasses.replace(
                found, activations=observe(model, tokens), read=read, unread=unread
            )
            wrong += _of_activations(found)
    if self_test:
        found = _tested(found, patient.config, None if wrong else model, say)
        wrong += [reason for trial in found.trials or [] if (reason := trial.what_is_wrong)]
    return dataclasses.replace(found, wrong=wrong)


def _facts(patient: Patient) -> Diagnosis:
    config = patient.config
    return Diagnosis(
        versions=environment.versions(),
        platform=environment.platform_facts(),
        settings=environment.settings(),
        devices=[],
        model={
            "source": patient.source,
            "name": config.name,
            "family": config.family,
            "weights": config.num_params,
            "dtype": str(patient.dtype),
            "quantized": str(config.weights) or None,
        },
    )


def _spread_ids(config: ModelConfig) -> list[int]:
    """Token ids for a model whose tokenizer is not there: each part of the vocabulary has one."""
    count = min(_MOST_IDS, config.vocab_size, config.max_context)
    return [i * config.vocab_size // count for i in range(count)]


def _tested(
    found: Diagnosis,
    config: ModelConfig,
    model: Transformer | None,
    say: Callable[[str], None],
) -> Diagnosis:
    """With the self-test's results."""
    runs = [choice for choice in found.choices if choice["chosen"] != "xla"]
    if runs:
        say("runs the kernel beside the reference")
        tried = f"The weights of {config.name}."
        if model is None:
            tried = f"Random weights of the shapes of {config.name}."
            model = selftest.random_model(config)
        results = selftest.trials(model)
    else:
        say("interprets the kernel's body beside the reference")
        tried = (
            "Random weights of a small model, the kernel's body interpreted: no kernel can run "
            "the model here."
        )
        results = [selftest.interpreted_trial()]
    say("measures the read bandwidth")
    return dataclasses.replace(found, trials=results, tried=tried, bandwidth=selftest.bandwidth())


def _idle_gpu(devices: list[dict[str, Any]]) -> list[str]:
    driver = environment.driver_version()
    if driver is None or os.environ.get("JAX_PLATFORMS") or devices[0]["platform"] != "cpu":
        return []
    return [
        f"There is an NVIDIA driver, {driver}, but JAX runs on the CPU. Install the plugin, with "
        "pip install 'ffjax[cuda13]', or set JAX_PLATFORMS=cpu if that is meant."
    ]


def _of_weights(bad: list[BadWeights]) -> list[str]:
    if not bad:
        return []
    first, tensors, rest = bad[0], len({one.name for one in bad}), len(bad) - 1
    more = f" So are {rest} more layers or tensors." if rest else ""
    what = _some(tensors, "tensor")
    where = f"{_where(first.name, first.layer)} has {first.count} of {first.size}"
    return [
        f"Weights are not finite in {what}: {where}, the first at {_index(first.first)}: "
        f"{first.value}.{more} Steps compute with them. Take an undamaged checkpoint, or "
        "convert it again."
    ]


def _of_activations(found: Diagnosis) -> list[str]:
    seen = found.activations
    if seen is None:
        return []
    if seen.first_bad is None:
        return _of_logits(seen)
    bad: BadActivation = seen.first_bad
    then = (
        "The weights above are why."
        if found.weights
        else f"All weights are finite, so the model overflows on {found.read}: report it."
    )
    return [
        f"Activations are not finite: the first tensor is {_where(bad.tensor, bad.layer)}, with "
        f"{bad.count} of {bad.size} values, the first at position {bad.position}, channel "
        f"{_index(bad.channel)}. {then}"
    ]


def _of_logits(seen: Activations) -> list[str]:
    """Whether they say nothing: where squares of the residual overflow, its norm is 0."""
    largest = {one.tensor: one for one in seen.largest}
    if largest["logits"].magnitude != 0:
        return []
    return [
        "All logits are 0: they choose no token. Norms square the residual, which reaches "
        f"{largest['residual_out'].magnitude:.4g}; beyond 1e19 the squares overflow, and the "
        "norm is 0. Look at the largest weights, and convert the checkpoint again."
    ]


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _where(name: str, layer: int | None) -> str:
    return name if layer is None else f"{name}, layer {layer}"


def _index(index: tuple[int, ...]) -> str:
    """A place in a tensor, as "[3, 5]"."""
    return f"[{', '.join(map(str, index))}]"
