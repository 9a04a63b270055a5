"""What a write leaves behind that does not end: nothing, or what the next one removes."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from checkpoints.atomic import why_not_written, written_beside
from checkpoints.manifest import CheckpointError, NotWrittenError

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = [
    pytest.mark.once(
        "Processes are killed while they write: that is the system's and ours.",
        sample=[
            "test_two_processes_do_not_write_to_one_place",
            "test_a_full_disk_is_a_sentence_and_directories_made_for_it_go",
        ],
    ),
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(os.name != "posix", reason="needs signals and locks of POSIX"),
]

# Writes half of a directory, says so, and waits to be stopped. Signals that this process ignores,
# as under nohup, a child would inherit.
_WRITER = """
import signal, sys, time
from pathlib import Path
from checkpoints.atomic import written_beside
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
with written_beside(Path(sys.argv[1]), lambda: None) as partial:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing `tmp_path / "out"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def write(path: pathlib.Path, text: str = "whole") -> None:
    with written_beside(path, lambda: None) as partial:
        (partial / "file").write_text(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_leaves_nothing(writer, tmp_path, number):
    assert len(list(tmp_path.iterdir())) == 1
    writer.send_signal(number)
    _, err = writer.communicate(timeout=30)
    assert writer.returncode == -number  # as it ends without us
    assert err == ""
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next(writer, tmp_path):
    writer.kill()
    writer.communicate(timeout=30)
    assert list(tmp_path.iterdir())
    write(tmp_path / "other")  # which is none of its business
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "out")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["other", "out"]
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["file"]


def test_two_processes_do_not_write_to_one_place(writer, tmp_path):
    with pytest.raises(FileExistsError, match="One process at a time writes to a place"):
        write(tmp_path / "out")
    assert writer.poll() is None
    write(tmp_path / "other")
    [partial] = [x for x in tmp_path.iterdir() if x.name.startswith(".")]
    assert (partial / "half").read_text() == "half"


def test_what_was_moved_away_by_a_killed_process_comes_back(tmp_path):
    """It was killed between two renamings: what was there has its other name still."""
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(ZeroDivisionError), written_beside(tmp_path / "out", lambda: None):
        assert (tmp_path / "out" / "file").read_text() == "old"
        raise ZeroDivisionError
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_a_thread_that_writes_on_finds_no_place(tmp_path):
    """As those of a library whose write has failed."""
    started, given_up, errors = threading.Event(), threading.Event(), []

    def write_on(directory: pathlib.Path) -> None:
        started.set()
        given_up.wait(30)
        try:
            (directory / "late").mkdir(parents=True)
        except OSError as error:
            errors.append(error)

    threads = []
    with pytest.raises(ZeroDivisionError), written_beside(tmp_path / "out", lambda: None) as made:
        threads.append(threading.Thread(target=write_on, args=(made,)))
        threads[0].start()
        started.wait(30)
        raise ZeroDivisionError
    given_up.set()
    threads[0].join()
    assert not list(tmp_path.iterdir())
    if sys.platform == "linux":
        assert errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_a_sentence_and_directories_made_for_it_go(tmp_path, number):
    path = tmp_path / "a" / "b" / "out"
    with pytest.raises(NotWrittenError) as caught, written_beside(path, lambda: None):
        raise OSError(number, os.strerror(number))
    said = os.strerror(number)
    said = f"cannot be written: {said[0].lower()}{said[1:]}. Nothing of it is left"
    assert said in str(caught.value)
    assert isinstance(caught.value, CheckpointError)
    assert isinstance(caught.value, OSError)
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_kind_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), written_beside(tmp_path / "out", lambda: None):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_long_errors_are_cut_to_what_happened():
    text = f"Error writing 'x': {os.strerror(errno.ENOSPC)} [source locations='a.cc:1\nb.cc:2']"
    assert why_not_written(ValueError(text)) == os.strerror(errno.ENOSPC)
    assert why_not_written(ValueError("first.\nsecond")) == "first"
    assert why_not_written(ValueError()) == "ValueError"


def test_signals_that_the_program_handles_are_its_own(tmp_path):
    came, before = [], signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with written_beside(tmp_path / "out", lambda: None):
            signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
        assert (tmp_path / "out").is_dir()
    finally:
        signal.signal(signal.SIGTERM, before)
    write(tmp_path / "again")
    assert signal.getsignal(signal.SIGTERM) is before
