"""Each field of a config.json is understood, harmless, refused or named in a warning."""

import json
import random
import re
import warnings
from pathlib import Path

import hf_field_table
import pytest
from test_hf_config import RELEASED

import checkpoints
from checkpoints import hf_config
from checkpoints.hf_effects import (
    GUARDS,
    HARMLESS,
    HARMLESS_PATTERNS,
    TRANSFORMERS,
    guards,
    is_harmless,
    understood,
)
from checkpoints.hf_families import FAMILIES, NESTED
from checkpoints.hf_fields import Fields

pytestmark = pytest.mark.filterwarnings("error")

WHERE = Path("some/folder")
RECORD = json.loads((Path(__file__).parent / "goldens" / "hf_fields.json").read_text())

# A released file of each family.
FILES = {
    next(n for n, f in FAMILIES.items() if [f.architecture] == data["architectures"]): data
    for data in RELEASED.values()
}

# Values that fields have somewhere, harmless or not.
VALUES = (None, False, True, 0, 1, 1.0, 0.5, 7, "", "x", [], [0], {}, {"a": 1}, -1)

# Read by what all models share, and of no effect without layers that are refused.
_OF_OTHER_LAYERS = {"number_of_conv_states"}


def read(data, ignore_fields=()):
    return hf_config.config_from_hf(data, WHERE, name="it", ignore_fields=ignore_fields)


def written(value):
    """A value as JSON, where 1 and 1.0 are one number, and true is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return json.dumps(float(value) if number else value)


# The tables


def test_the_page_has_the_tables_of_the_code():
    page = hf_field_table.PAGE.read_text(encoding="utf-8")
    assert page == hf_field_table.page_with(hf_field_table.tables()), (
        "docs/huggingface.md is not what the code does: run tests/hf_field_table.py"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_is_of_one_kind(family):
    names = set(GUARDS) | understood(family) | set().union(*HARMLESS.values())
    for name in names:
        kinds = (name in understood(family), name in guards(family), is_harmless(name, family))
        assert sum(kinds) == 1, (name, kinds)
    assert sum(map(len, HARMLESS.values())) == len(frozenset().union(*HARMLESS.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_called_understood_is_what_is_read(family, monkeypatch):
    made = []

    class Spy(Fields):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(hf_config, "Fields", Spy)
    every = dict(FILES[family])
    if FAMILIES[family].windows == "pattern":
        pattern = FAMILIES[family].defaults["sliding_window_pattern"]
        every |= dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), pattern)
        every.setdefault("hidden_act", "gelu_pytorch_tanh")
    read(every)
    elsewhere = {"architectures", "eos_token_id"}
    assert made[0].taken | elsewhere == understood(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_reads_is_known(family):
    """Recorded from its sources, by record_hf_fields.py."""
    assert RECORD["transformers"] == TRANSFORMERS
    unknown = {
        name
        for name in RECORD["reads"][family]
        if name not in understood(family)
        and name not in guards(family)
        and not is_harmless(name, family)
    }
    unused = {name for _, _, names in NESTED.values() for name in names}
    assert unknown - (unused if family == "gemma3" else set()) <= _OF_OTHER_LAYERS


def test_causal_is_what_transformers_takes_for_true():
    for value, causal in RECORD["causal"]:
        assert GUARDS["is_causal"].allows(value) == causal, value


# Draws


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(25))
def test_any_fields_are_judged_each_by_its_kind(family, seed):
    draw = random.Random(f"{family} {seed}")
    patterns = [p.replace("*", "some_") for ps in HARMLESS_PATTERNS.values() for p in ps]
    harmless = [*sorted(set().union(*HARMLESS.values()) - {"auto_map"}), *patterns]
    names = draw.sample(harmless, 6) + draw.sample(sorted(guards(family)), draw.choice((0, 1, 3)))
    unknown = [f"field_{draw.randrange(10**6)}" for _ in range(draw.choice((0, 0, 1, 2)))]
    own = FILES[family]
    fields = {
        name: draw.choice(VALUES)
        for name in [*names, *unknown]
        if name not in understood(family) and name not in own
    }
    data = dict(own)
    for name in draw.sample(sorted(fields), len(fields)):  # in any order
        data[name] = fields[name]
    refused = sorted(
        name
        for name, value in fields.items()
        if name in guards(family)
        and written(value) not in map(written, guards(family)[name].harmless)
    )
    named = sorted(name for name in fields if name in unknown)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if refused:
            with pytest.raises(checkpoints.CheckpointError) as error:
                read(data)
            text = str(error.value)
            listed = [name for name in fields if re.search(rf"\b{re.escape(name)} \(", text)]
            assert sorted(listed) == refused
            assert not caught
            for i in range(1, len(refused)):  # one that is left is enough
                with pytest.raises(checkpoints.CheckpointError, match=re.escape(refused[0])):
                    read(data, refused[i:])
        got = read(data, refused)
    assert got == read(own)
    assert len(caught) == bool(named)
    if named:
        text = str(caught[0].message)
        assert [name for name in fields if f"{name} (" in text] == [
            name for name in fields if name in named
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read(data, [*refused, *named]) == got
