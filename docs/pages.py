"""What MkDocs does beside its plugins: pages that lie elsewhere, the commands' help, and links.

Files outside of docs/ have pages of their own where people read them (`OUTSIDE`). A link to any
other file of the checkout has nowhere to go on the site, and becomes its text.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

OUTSIDE = {
    "readme.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "model-card.md": "checkpoints/MODEL_CARD.md",
}
"""Pages of the site, and the files that they are."""

COMMANDS = "reference/commands.md"

# Text, then where it goes: nothing with a scheme, no place in the same page.
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that do not lie in docs/."""
    for page, source in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, COMMANDS, content=command_pages()))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Has links lead to pages of the site, or be text."""
    own = page.file.src_uri
    folder = Path(OUTSIDE.get(own, f"docs/{own}")).parent

    def to_page(found: re.Match[str]) -> str:
        text, (target, hash, place) = found[1], found[2].partition("#")
        path = os.path.relpath(ROOT / folder / target, ROOT)
        pages = {source: name for name, source in OUTSIDE.items()}
        uri = pages.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            if (ROOT / path).exists():
                return text
            return found[0]  # a mistake, which MkDocs will tell
        here = os.path.relpath(uri, os.path.dirname(own) or ".")
        return f"[{text}]({here}{hash}{place})"

    return _LINK.sub(to_page, markdown)


def command_pages() -> str:
    """What every command says of itself."""
    from ffjax.arguments import make_parser
    from ffjax.cli import commands

    os.environ["COLUMNS"] = "100"  # what argparse wraps at
    parser = make_parser(commands(), "")
    [subparsers] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parts = ["# Command line", "What `ffjax COMMAND --help` prints."]
    for name, command in subparsers.choices.items():
        parts += [f"## ffjax {name}", f"```text\n{command.format_help().rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"
