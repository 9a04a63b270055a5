"""Errors that are planted in inline PTX: made from the text taken apart.

A mutation is a pattern of one instruction and what becomes of it:

    ("setp.lt.u32 go, asked, limit", "setp.le.u32 go, asked, limit")
    ("@wanted st.shared.b32 [place+*]", "st.shared.b32 [place+*]")
    ("xor.b32 phase, phase, 1", "")

A register is named by its role: `go` stands for %go and for all that a text declares besides under
that name, %go_2 and so on; `go_1` and `go_2` for one of them alone. `$3` is what is bound, and `*`
anything. Operands after those of the pattern are the instruction's own. A pattern without a guard
finds instructions with any, which they keep; a guard that the pattern names is there, and is left
out where the other side names none. All instructions that are found are changed, or with `#2`
after the pattern the second one alone.
"""

from __future__ import annotations

import re

from ptx_text import Parts, statements, take_apart, without_comments

__all__ = ["Mutation", "mutated", "occurs"]

Mutation = tuple[str, str]

_WORD = re.compile(r"\*|[$%]?\w+(?:[.:]+\w+)*|[^\s\w]")
_NUMBERED = re.compile(r"(.*?)_(\d+)")


def occurs(text: str, mutation: Mutation) -> bool:
    """Whether a text has instructions that a mutation is about."""
    return mutated(text, mutation, strict=False) != without_comments(text)


def mutated(text: str, mutation: Mutation, *, strict: bool = True) -> str:
    """The text with an error in it.

    Args:
        text: inline PTX.
        mutation: what to change.
        strict: whether the text must have what is to be changed.

    Raises:
        LookupError: it has not; no error that a check of a text may end in.
    """
    text = without_comments(text)
    wanted, _, which = mutation[0].partition(" #")
    pattern, change, number = _pattern(wanted), mutation[1], 0
    made, at = [], 0
    for found in statements(text):
        line = (found["line"] or "").strip()
        if not line or line.startswith("."):
            continue
        parts = take_apart(line)
        names = _meets(parts, pattern)
        if names is None:
            continue
        number += 1
        if which and number != int(which):
            continue
        start = found.end() - len(found[0].lstrip())
        more = parts.operands[len(pattern.operands) :]
        guard = "" if pattern.guard else parts.guard
        made.append(text[at:start] + _changed(change, names, guard, more, text))
        at = found.end()
    if strict and not made:
        raise LookupError(f"{mutation[0]} does not occur in {text}")
    return "".join([*made, text[at:]])


def _pattern(line: str) -> Parts:
    """A pattern's parts: registers have no % there."""
    found = re.fullmatch(r"(?:@(!?\w+)\s+)?(\S+)(?:\s+(.*))?", line.strip().rstrip(";"))
    assert found is not None, f"{line!r} is no instruction."
    return Parts(found[1] or "", found[2], _operands(found[3] or ""))


def _operands(text: str) -> tuple[str, ...]:
    return tuple(x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,][^,]*", text))


def _meets(parts: Parts, pattern: Parts) -> dict[str, list[str]] | None:
    """What a pattern's words stand for in an instruction, in order; None: it is another one."""
    if parts.opcode != pattern.opcode or len(parts.operands) < len(pattern.operands):
        return None
    names: dict[str, list[str]] = {}
    pairs = list(zip(parts.operands, pattern.operands, strict=False))
    if pattern.guard:
        pairs.insert(0, (parts.guard, pattern.guard))
    for operand, wanted in pairs:
        if wanted == "*":
            names.setdefault("*", []).append(operand)
            continue
        words, roles = _WORD.findall(operand), _WORD.findall(wanted)
        if len(words) != len(roles):
            return None
        for word, role in zip(words, roles, strict=True):
            if role != "*" and not _is(word, role):
                return None
            names.setdefault(role, []).append(word)
    return names


def _is(word: str, role: str) -> bool:
    if not word.startswith("%") or "." in word:
        return word == role
    name, numbered = word[1:], _NUMBERED.fullmatch(role)
    if name == role or (numbered and numbered[2] == "1" and name == numbered[1]):
        return True
    of = _NUMBERED.fullmatch(name)
    return of is not None and of[1] == role


def _changed(
    change: str, names: dict[str, list[str]], guard: str, more: tuple[str, ...], text: str
) -> str:
    """The instructions that come instead, in the words of the one that was found."""
    out, left = [], {role: list(words) for role, words in names.items()}

    def said(match: re.Match[str]) -> str:
        role = match[0]
        if role in left:
            # Of several the first for the first one, and so on; then the last one again.
            return left[role].pop(0) if len(left[role]) > 1 else left[role][0]
        if not re.fullmatch(r"[a-z]\w*", role):
            return role
        one = re.sub("_1$", "", role)
        if not re.search(rf"%{one}\b", text):
            raise LookupError(f"%{one} does not occur in {text}")
        return f"%{one}"

    for line in filter(None, (x.strip() for x in change.split(";"))):
        parts = _pattern(line)
        own = _WORD.sub(said, parts.guard) if parts.guard else guard
        of = f"@{own} " if own else ""
        if parts.opcode == "bra":  # a label
            operands = list(parts.operands)
        else:
            operands = [*(_WORD.sub(said, x) for x in parts.operands), *more]
        out.append(f"{of}{parts.opcode} {', '.join(operands)}".rstrip() + ";")
    return " ".join(out) or " "
