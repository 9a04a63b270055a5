"""A chat at a terminal and in a pipe, with answers that are known."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pseudo_terminal import CTRL_A, CTRL_C, CTRL_D, CTRL_U, UP, Terminal, terminal

from ffjax.terminal.messages import command_of, read_message
from ffjax.terminal.screen import harmless

TESTS = Path(__file__).parent
STAND_IN = TESTS / "chat_stand_in.py"


@pytest.fixture
def home(tmp_path):
    """A folder that the chat runs in, with a state folder of its own."""
    return tmp_path


def environ(home: Path, **more: str) -> dict[str, str]:
    paths = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "XDG_STATE_HOME": str(home / "state"),
        "NO_COLOR": "",
        **more,
    }


@pytest.fixture
def at(home):
    """Opens terminals with a chat that is ready."""

    def start(*options: str, columns: int = 100, **more: str):
        command = [sys.executable, STAND_IN, *options]
        return terminal(command, columns=columns, cwd=home, env=environ(home, **more))

    return start


def ready(shell: Terminal) -> None:
    shell.expect("Ready in")
    shell.expect("> ")


def interrupt(shell: Terminal, text: str) -> None:
    """Types something, and Ctrl-C once readline waits for the next key."""
    shell.keys(text)
    shell.expect(text)
    time.sleep(0.2)
    shell.keys(CTRL_C)


def leave(shell: Terminal) -> None:
    shell.line(CTRL_D, end="")
    assert shell.end() == 0


def piped(home: Path, text: str | bytes, *options: str, **more: str):
    data = text if isinstance(text, bytes) else text.encode()
    return subprocess.run(
        [sys.executable, STAND_IN, *options],
        input=data,
        capture_output=True,
        cwd=home,
        env={**os.environ, **environ(home, **more)},
        timeout=120,
    )


# A terminal


def test_lines_are_edited_and_remembered(at, home):
    with at() as shell:
        ready(shell)
        shell.line(f"world{CTRL_A}hello ")
        shell.expect(r"1:'hello world'\n")
        shell.expect("> ")
        shell.line(f"{UP}!")
        shell.expect(r"3:'hello world!'\n")
        shell.expect("> ")
        shell.line(f"gone{CTRL_U}größe 漢字\x7f語 🙂")
        shell.expect(r"5:'größe 漢語 🙂'\n")
        leave(shell)
    history = home / "state" / "ffjax" / "chat_history"
    assert history.read_text(encoding="utf-8").splitlines()[-3:] == [
        "hello world",
        "hello world!",
        "größe 漢語 🙂",
    ]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with at() as shell:  # the next chat has them
        ready(shell)
        shell.line(f"{UP}{UP}?")
        shell.expect(r"1:'hello world!\?'")
        leave(shell)


def test_figures_follow_an_answer_in_dim_text(at):
    with at() as shell:
        ready(shell)
        shell.line("hello")
        shell.expect(r"9 tokens, 12.5 tokens/s, first after 0.\d\d s")
        shell.expect("0 of 5 context tokens cached")
        shell.line("again")
        shell.expect("14 of 19 context tokens cached")
        leave(shell)
    assert b"\x1b[2m9 tokens" in shell.raw


@pytest.mark.parametrize("setting", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_nothing_is_dim_where_that_is_not_wanted(at, setting):
    with at(**setting) as shell:
        ready(shell)
        shell.line("hello")
        shell.expect("9 tokens")
        leave(shell)
    assert b"\x1b[2m" not in shell.raw
    if "TERM" in setting:
        assert b"\x1b" not in shell.raw


def test_no_figures(at):
    with at("--no-figures") as shell:
        ready(shell)
        shell.line("hello")
        shell.expect("1:'hello'")
        shell.expect("> ")
        leave(shell)
    assert "tokens" not in shell.text


def test_several_lines_are_one_message(at):
    with at() as shell:
        ready(shell)
        shell.line("one\\")
        shell.expect(r"\. ")
        shell.line("two")
        shell.expect(r"1:'one\\ntwo'")
        shell.expect("> ")
        shell.line('"""three')
        shell.expect(r"\. ")
        shell.line("/help")
        shell.expect(r"\. ")
        shell.line('four"""')
        shell.expect(r"3:'three\\n/help\\nfour'")
        leave(shell)


def test_pasted_lines_are_one_message(at):
    with at() as shell:
        ready(shell)
        shell.keys("\x1b[200~one\ntwo\x1b[201~")
        shell.line("")
        shell.expect(r"1:'one\\ntwo'")
        leave(shell)


def test_ctrl_c_stops_the_answer_and_not_the_program(at):
    with at() as shell:
        ready(shell)
        shell.line("count")
        shell.expect("3 4 ")
        shell.keys(CTRL_C)
        shell.expect("Stopped; what it said is kept")
        shell.expect("> ")
        shell.line("hello")
        shell.expect("3:'hello'")  # with what was said
        leave(shell)
    assert "Traceback" not in shell.text


def test_a_second_ctrl_c_breaks_off_what_takes_long(at):
    with at() as shell:
        ready(shell)
        shell.line("prefill")
        shell.expect("reading")
        shell.keys(CTRL_C)
        shell.expect("Ctrl-C again breaks off sooner")
        shell.keys(CTRL_C)
        shell.expect(r"Stopped\.")
        shell.expect("> ")
        shell.line("hello")
        shell.expect("1:'hello'")  # the message is taken back
        leave(shell)
    assert "Traceback" not in shell.text


def test_ctrl_c_at_the_prompt_drops_the_line_and_says_how_to_leave(at):
    with at() as shell:
        ready(shell)
        for _ in range(2):
            interrupt(shell, "not this")
            shell.expect("Ctrl-D or /quit leaves")
            shell.expect("> ")
        shell.line("one\\")
        shell.expect(r"\. ")
        interrupt(shell, "two")
        shell.expect("Ctrl-D or /quit leaves")
        shell.line("this")
        shell.expect("1:'this'")
        leave(shell)


def test_a_narrow_window(at):
    with at(columns=24) as shell:
        ready(shell)
        words = "a line that is longer than the window"
        shell.line(f"{words}{CTRL_A}first, ")
        shell.expect("1:'first, a line")
        shell.expect("context tokens cached")
        shell.line("/help")
        shell.expect("Ctrl-D leaves")
        leave(shell)
    said = shell.text
    notes = said[said.index("/help: ") :].splitlines()
    assert max(map(len, notes)) <= 24
    assert "/retry: answers the" in notes


def test_tab_completes_commands_settings_and_files(at, home):
    (home / "kept.json").write_text('[{"role": "user", "content": "seed"}]')
    with at(columns=300) as shell:
        ready(shell)
        shell.line("/lo\tke\t")
        shell.expect("Loaded 1 message of .*kept.json. The last one has no answer: /retry")
        shell.line("/se\ttemp\t0.5")
        shell.expect("temperature 0.5")
        shell.line("/retry")
        shell.expect("seed 7 temperature 0.5")
        shell.line("/retry")
        shell.expect("seed 8 temperature 0.5")
        leave(shell)


def test_orders_to_the_terminal_are_shown_and_not_followed(at):
    with at() as shell:
        ready(shell)
        shell.line("escape")
        shell.expect(r"a␛\[31mred␇\n")
        leave(shell)
    assert harmless("é\t漢\n\x9b") == "é\t漢\n\ufffd"


def test_errors_are_sentences_and_the_chat_goes_on(at):
    with at() as shell:
        ready(shell)
        shell.line("fail")
        shell.expect("The stand-in was told to fail.")
        shell.line("break")
        shell.expect("so far\n")
        shell.expect("The logits became NaN")
        shell.line("hello")
        shell.expect("1:'hello'")
        shell.line("/sav x")
        shell.expect("There is no command /sav. Is /save meant?")
        shell.line("/nothing")
        shell.expect("/help lists them")
        shell.line("/etc/fstab is what")
        shell.expect("3:'/etc/fstab is what'")
        shell.line(" /nothing")
        shell.expect("5:'/nothing'")
        leave(shell)
    assert "Traceback" not in shell.text


def test_the_end_of_the_context_loses_nothing(at):
    with at() as shell:
        ready(shell)
        shell.line("x" * 140)
        shell.expect("1:'x")
        shell.line("hello!!")
        shell.expect("The model's context is full, with 300 tokens. Nothing is lost")
        shell.line("hello")
        shell.expect("The context has 300 tokens; the messages are 30")
        shell.expect("Nothing is lost: /save FILE keeps")
        shell.line("/save all.json")
        shell.expect("Saved 4 messages")
        shell.line("/reset")
        shell.expect("All that was said is forgotten")
        shell.line("hello")
        shell.expect("1:'hello'")
        leave(shell)


def test_a_terminal_that_closes_ends_it(at, home):
    with at() as shell:
        ready(shell)
        shell.line("hello")
        shell.expect("1:'hello'")
    assert "hello" in (home / "state" / "ffjax" / "chat_history").read_text()


# A pipe


def test_each_line_of_a_pipe_is_a_message(home):
    done = piped(home, "hello\n\nzwölf 漢字\r\nlast", "--no-figures", TERM="xterm-256color")
    assert done.stdout.decode() == "1:'hello'\n3:'zwölf 漢字'\n5:'last'\n"
    assert (done.returncode, done.stderr) == (0, b"")
    assert not (home / "state").exists()


def test_figures_of_a_pipe_are_on_stderr_without_escapes(home):
    done = piped(home, "hello\n", TERM="xterm-256color")
    assert done.stdout == b"1:'hello'\n"
    assert done.stderr.startswith(b"9 tokens, 12.5 tokens/s")
    assert b"\x1b" not in done.stderr


def test_an_error_ends_a_pipe(home):
    done = piped(home, "one\nfail\ntwo\n", "--no-figures")
    assert done.stdout == b"1:'one'\n"
    assert b"told to fail" in done.stderr
    assert done.returncode != 0


def test_bytes_that_are_no_text_are_told_of(home):
    done = piped(home, b"caf\xe9\n", LC_ALL="C.UTF-8")
    assert b"some bytes of this one are not" in done.stderr


def test_commands_work_in_a_pipe(home):
    text = "/system Be brief.\n/set max_tokens 3\nsystem\nhello\n/undo\n/reset\nsystem\n"
    done = piped(home, text, "--no-figures")
    assert done.stdout.decode() == "Be \n4:'\nBe \n"


def test_an_empty_answer_is_an_empty_line_of_a_pipe(home):
    done = piped(home, "empty\nhello\n", "--no-figures")
    assert done.stdout == b"\n1:'hello'\n"
    assert b"The answer is empty" in done.stderr


# Files


def test_a_conversation_is_saved_and_goes_on(home):
    text = "hello\n/save a.json\nmore\n/save a.json\n"
    done = piped(home, text, "--no-figures", "--system", "Sei kürzer.")
    assert done.returncode == 0, done.stderr
    messages = json.loads((home / "a.json").read_text(encoding="utf-8"))
    assert [one["role"] for one in messages] == ["system", *["user", "assistant"] * 2]
    assert messages[0]["content"] == "Sei kürzer."
    done = piped(home, "/load a.json\nsystem\n", "--no-figures")
    assert done.stdout.decode() == "Sei kürzer.\n"
    assert sorted(os.listdir(home)) == ["a.json"]


def test_a_file_that_is_there_is_replaced_only_when_that_is_said(at, home):
    (home / "a.json").write_text("mine")
    with at() as shell:
        ready(shell)
        shell.line("/save a.json")
        shell.expect("There is nothing to save yet")
        shell.line("hello")
        shell.expect("1:'hello'")
        shell.line("/save a.json")
        shell.expect("is there already. Give another name, or /save --overwrite")
        assert (home / "a.json").read_text() == "mine"
        shell.line("/save nowhere/a.json")
        shell.expect("nowhere/a.json: no such file or directory")
        shell.line("/save .")
        shell.expect("is a folder")
        shell.line("/save --overwrite a.json")
        shell.expect("Saved 2 messages")
        leave(shell)
    assert len(json.loads((home / "a.json").read_text())) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON in UTF-8"),
        ('{"a": 1}', "holds something else"),
        ('[{"role": "user"}]', "message 1 of .* is none"),
        ('[{"role": "tool", "content": ""}]', "message 1 of .* is none"),
        ('[{"role": "user", "content": ""}, 3]', "message 2 of .* is none"),
    ],
)
def test_files_that_hold_no_conversation(home, text, said):
    from ffjax.terminal.saved import read_messages

    (home / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"A conversation is a JSON array.*{said}"):
        read_messages(home / "a.json")


# What is typed


class Typed:
    def __init__(self, *lines: str):
        self._lines = iter(lines)

    def read(self, prompt: str) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise EOFError from None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a"], "a"),
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (["a\\\\"], "a\\\\"),
        (["a\\"], "a"),
        (['"""', "a", "", "b", '"""'], "a\n\nb"),
        (['"""a"""'], "a"),
        (['"""a', "b"], "a\nb"),
    ],
)
def test_lines_become_messages(lines, message):
    assert read_message(Typed(*lines)) == message


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("/help", ("help", "")),
        ("/SAVE  a b.json ", ("save", "a b.json")),
        ("/system a\nb", ("system", "a\nb")),
        ("/?", ("?", "")),
        ("/a/b", None),
        (" /help", None),
        ("/", None),
        ("hello /help", None),
    ],
)
def test_commands_are_told_from_messages(text, command):
    assert command_of(text) == command
