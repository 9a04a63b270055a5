"""The tables of docs/huggingface.md, made from the code that decides.

Run as a script, it writes them into the page:

    python tests/hf_field_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints.hf_effects import (
    GUARDS,
    HARMLESS,
    HARMLESS_PATTERNS,
    TRANSFORMERS,
    guards,
    is_harmless,
    understood,
)
from checkpoints.hf_families import FAMILIES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "huggingface.md"
BEGIN, END = "<!-- made by tests/hf_field_table.py: begin -->", "<!-- end -->"


def _code(names) -> str:
    return " ".join(f"`{name}`" for name in sorted(names))


def _where(families: list[str]) -> str:
    return "all" if len(families) == len(FAMILIES) else ", ".join(families)


def tables() -> str:
    """The tables, in Markdown."""
    known = sorted(set().union(*map(understood, FAMILIES)))
    lines = [
        f"By what transformers {TRANSFORMERS} reads.",
        "",
        "### Understood",
        "",
        "| field | families |",
        "| --- | --- |",
    ]
    for name in known:
        where = [family for family in FAMILIES if name in understood(family)]
        lines.append(f"| `{name}` | {_where(where)} |")
    lines += ["", "### Harmless", "", "| what they are about | fields |", "| --- | --- |"]
    for reason, names in HARMLESS.items():
        lines.append(f"| {reason} | {_code(names)} |")
    for reason, patterns in HARMLESS_PATTERNS.items():
        lines.append(f"| {reason} | {_code(patterns)} |")
    for family in FAMILIES:
        alone = [name for name in GUARDS if is_harmless(name, family)]
        if alone:
            lines.append(f"| what {family} does not read | {_code(alone)} |")
    lines += [
        "",
        "### Refused, but for a few values",
        "",
        "| field | accepted | else it asks for | families |",
        "| --- | --- | --- | --- |",
    ]
    for name, guard in sorted(GUARDS.items()):
        where = [family for family in FAMILIES if name in guards(family)]
        values = " ".join(f"`{json.dumps(value)}`" for value in guard.harmless)
        lines.append(f"| `{name}` | {values} | {guard.why} | {_where(where)} |")
    return "\n".join(lines)


def page_with(text: str) -> str:
    """The page with its tables replaced."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with(tables()), encoding="utf-8")
