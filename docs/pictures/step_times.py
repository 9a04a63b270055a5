"""Draws the README's picture, `step-times.svg`, from the table of docs/benchmarks.md.

python docs/pictures/step_times.py

Nothing but the standard library is needed. A test fails where the picture is older than the table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
TABLE = FOLDER.parent / "benchmarks.md"
PICTURE = FOLDER / "step-times.svg"

NAMES = {
    "llama3.2-1b": "Llama 3.2 1B",
    "llama3.2-3b": "Llama 3.2 3B",
    "llama3.1-8b": "Llama 3.1 8B",
}
WIDTH, LEFT, FULL, TOP, GROUP, BAR = 760, 130, 500, 66, 72, 22

_ROW = re.compile(
    r"^\| `ffjax bench --config (\S+) --compare xla` \| 1 at 96 "
    r"\| (\d+) \| \d+ \| ([\d.]+) \| (\d+) \|",
    re.M,
)
_RATE = re.compile(r"read\s+memory at [\d.]+ to ([\d.]+) TB/s")

STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .title { font-size: 16px; font-weight: 600 }
  .small { font-size: 12px; fill: #59636e }
  .ground { fill: #ffffff } .xla { fill: #c4ccd4 } .ffjax { fill: #2f6f9f }
  .floor { stroke: #c2410c; stroke-width: 2.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 }
    .ground { fill: #0d1117 } .xla { fill: #57606a } .ffjax { fill: #58a6d8 }
    .floor { stroke: #fb923c }
  }
"""


class Row(NamedTuple):
    """A row of the table that has a time for XLA.

    Attributes:
        config: the preset.
        ffjax: microseconds of a step.
        xla: microseconds of a step in plain JAX.
        floor: microseconds to read the step's bytes at the fastest rate that was measured.
    """

    config: str
    ffjax: float
    xla: float
    floor: float


def rows_of(page: str) -> list[Row]:
    """The rows of the page that compare with XLA."""
    rate = _RATE.search(page)
    if rate is None:
        raise ValueError(f"{TABLE.name} does not say how fast the cards read memory.")
    return [
        Row(config, float(us), float(xla), float(us) * float(speed) / float(rate[1]))
        for config, us, speed, xla in _ROW.findall(page)
    ]


def picture_of(rows: list[Row]) -> str:
    """The picture, as the text of an SVG. Each model has a scale of its own: XLA is full width."""
    height = TOP + GROUP * len(rows) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Time of a decode step">',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="8"/>',
        '<text class="title" x="20" y="28">Time of one decode step (shorter is better)</text>',
        '<text class="small" x="20" y="48">One sequence, bfloat16, position 96, NVIDIA H200. '
        "Each model has its own scale.</text>",
    ]
    for number, row in enumerate(rows):
        top = TOP + GROUP * number
        parts.append(f'<text x="20" y="{top + 28}">{NAMES[row.config]}</text>')
        for line, (name, time) in enumerate({"ffjax": row.ffjax, "xla": row.xla}.items()):
            y, long = top + (BAR + 4) * line, FULL * time / row.xla
            label = f"{'ffjax' if name == 'ffjax' else 'XLA'} {time:.0f} us"
            parts.append(
                f'<rect class="{name}" x="{LEFT}" y="{y}" width="{long:.1f}" height="{BAR}"/>'
                f'<text x="{LEFT + long + 8:.1f}" y="{y + 16}">{label}</text>'
            )
        x = LEFT + FULL * row.floor / row.xla
        parts.append(
            f'<line class="floor" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" '
            f'y2="{top + 2 * BAR + 8}"/>'
        )
    y = height - 16
    parts += [
        f'<line class="floor" x1="{LEFT}" x2="{LEFT}" y1="{y - 11}" y2="{y + 3}"/>',
        f'<text class="small" x="{LEFT + 10}" y="{y}">memory floor: the time to read the bytes of '
        "the step, and nothing else</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Writes the picture."""
    PICTURE.write_text(picture_of(rows_of(TABLE.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
