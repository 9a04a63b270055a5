"""What the command line says of an error: a sentence or two, whatever it was.

Nothing is imported here that may fail itself: an error may be that JAX cannot be imported.
"""

from __future__ import annotations

import dis
import os
import re
import traceback

__all__ = ["in_options", "sentence", "without_advice"]

# What the library raises for bad input and for what cannot run here.
_OF_INPUT = (ValueError, TypeError, NotImplementedError, OSError)
# What JAX raises where it starts no device.
_OF_JAX = (RuntimeError, AssertionError)
_OURS = ("ffjax", "checkpoints", "pallas_kernels")
_LONGEST = 300
# How JAX says that a device's memory is full.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")

# The library's words for what the command line has options for.
_OPTIONS = {
    r"implementation='(\w+)'": r"--implementation \1",
    r"prefill='(\w+)'": r"--prefill \1",
    r"group_size=(\d+)": r"--group-size \1",
    r"overwrite=True": "--overwrite",
    r"ffjax\.quantize with head=": "ffjax quantize --head",
}


def in_options(text: str) -> str:
    """A sentence of the library in the words of the command line: options for arguments."""
    for pattern, option in _OPTIONS.items():
        text = re.sub(pattern, option, text)
    return text


def without_advice(reason: str) -> str:
    """Why no kernel can run, where the command takes the reference of itself, or has none."""
    return re.sub(r" Use implementation='xla'( here)?\.$", "", reason)


def sentence(error: BaseException) -> str:
    """Says what went wrong, and what to do.

    Args:
        error: as it was caught, with its traceback: an error that this project raises of its
            input speaks for itself, the like raised by what it calls does not.
    """
    if _while_importing_jax(error):
        return _refused_setting(error)
    if (reason := _no_device(error)) is not None:
        return reason
    if isinstance(error, OSError) and error.errno is not None:
        return _of_files(error)
    if isinstance(error, _OF_INPUT) and _raised_by_us(error) and str(error):
        return in_options(str(error))
    if isinstance(error, MemoryError):
        return (
            "The host's memory does not suffice. Take a smaller model, or a quantized one, or "
            "fewer and shorter sequences."
        )
    if any(words in str(error) for words in _NO_MEMORY):
        said = _short(error).removeprefix("RESOURCE_EXHAUSTED: ").removeprefix("INTERNAL: ")
        return (
            f"The device's memory does not suffice: {said}. Take a smaller model, or a quantized "
            "one, or fewer and shorter sequences; or see what else uses the device."
        )
    said = _short(error)
    return (
        f"This is an error inside ffjax: {type(error).__name__}{f', {said}' if said else ''}. "
        "Please report it, with what the same command prints under --traceback."
    )


def _short(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0][:_LONGEST].rstrip(". ") if lines else ""


def _while_importing_jax(error: BaseException) -> bool:
    bodies = [
        frame.f_globals.get("__name__")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    return any(str(name).startswith("jax") for name in bodies)


def _raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` of this project made an error.

    What compiled code raises, and JAX, which leaves its own frames out, seems to come of the line
    of ours that has called it: hence the look at the instruction.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code, names = last.tb_frame.f_code, last.tb_frame.f_globals
    # `python -m` calls a module __main__; how it was found says its name.
    name = str(getattr(names.get("__spec__"), "name", None) or names.get("__name__"))
    is_raise = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return is_raise and name.partition(".")[0] in _OURS


def _refused_setting(error: BaseException) -> str:
    """Of what JAX raises when it is imported: an environment variable that it does not know."""
    said = _short(error)
    named = [
        f"{name} is {value!r}"
        for name, value in sorted(os.environ.items())
        if name.startswith("JAX_") and name.lower() in said.lower()
    ]
    which = f" {' and '.join(named)}: correct or unset it." if named else ""
    return f"JAX cannot be imported: {said or type(error).__name__}.{which}"


def _no_device(error: BaseException) -> str | None:
    """Why JAX runs on no device, where that is what an error comes of; else None."""
    # A checkpoint that cannot be read or written says so of whatever is raised meanwhile.
    cause = error.__cause__ or error
    if not isinstance(cause, _OF_JAX) or isinstance(cause, _OF_INPUT):
        return None
    from ffjax.environment import why_no_device

    return why_no_device(cause)


def _of_files(error: OSError) -> str:
    """An error of the operating system in its own words, the file first."""
    said = error.strerror or type(error).__name__
    if error.filename is None:
        return f"Reading or writing failed: {said[0].lower()}{said[1:]}."
    return f"{os.fsdecode(error.filename)}: {said[0].lower()}{said[1:]}."
