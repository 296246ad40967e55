"""Streams that are closed, full or without a reader, signals, and system calls that fail.

Every case ends with a documented code, and none with a 1 that reads as a verdict.
"""

from __future__ import annotations

import builtins
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND, Call, environment, gaussian, listing, save

import qconvert
from qconvert.cli import main as entry
from qconvert.cli.progress import LineProgress
from qconvert.cli.streams import write_stdout
from qconvert.errors import MachineError
from qconvert.interrupts import held
from qconvert.stages.verify import VerifyOptions, verify


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a qblk file of it. Read only."""
    place = tmp_path_factory.mktemp("prepared")
    save(place / "m.safetensors", {"w": gaussian(1, 40, 64)})
    line = ["quantize", "m.safetensors", "--scheme", "q8_block32", "-o", "m.qblk", "-q"]
    subprocess.run([*COMMAND, *line], cwd=place, env=environment(), check=True, capture_output=True)
    return place


LINES = {
    "inspect": "inspect m.safetensors",
    "verify": "verify m.qblk --against m.safetensors",
    "quantize": "quantize m.safetensors --scheme q4_block32 -o {out} --force",
    "refused": "inspect nowhere.safetensors",
    "usage": "quantize",
    "help": "--help",
}
# What each ends with when all is well; and when nobody can be told what it found.
CODES = {"inspect": 0, "verify": 0, "quantize": 0, "refused": 3, "usage": 2, "help": 0}
UNTOLD = {"inspect": 4, "verify": 4, "quantize": 4, "refused": 3, "usage": 2, "help": 4}


def shell(prepared: Path, out: Path, line: str, how: str, before: str = "") -> tuple[int, str]:
    """Exit code, and what came to the stream that was left open."""
    command = f"{before} {' '.join(COMMAND)} {LINES[line].format(out=out)} {how}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=prepared, env=environment(), capture_output=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("how", [">&-", ">/dev/full", "<&- >&-"])
def test_a_stdout_that_takes_nothing_is_the_machines_fault(
    line: str, how: str, prepared: Path, tmp_path: Path
) -> None:
    code, told = shell(prepared, tmp_path / "o.qblk", line, how)
    assert code == UNTOLD[line]
    assert "Traceback" not in told
    if line == "quantize":
        assert "o.qblk is complete" in told
        assert verify(tmp_path / "o.qblk", VerifyOptions()).status == "pass"


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("how", ["2>&-", "2>/dev/full", "2> >(exit)", "<&- 2>&-"])
def test_a_stderr_that_takes_nothing_changes_nothing(
    line: str, how: str, prepared: Path, tmp_path: Path
) -> None:
    code, told = shell(prepared, tmp_path / "o.qblk", line, how)
    assert code == CODES[line]
    assert "Traceback" not in told
    if line == "quantize":
        assert verify(tmp_path / "o.qblk", VerifyOptions()).status == "pass"


def test_no_output_lands_on_a_descriptor_of_the_streams(prepared: Path, tmp_path: Path) -> None:
    """What is printed would be in the file."""
    whole = tmp_path / "whole.qblk"
    assert shell(prepared, whole, "quantize", "")[0] == 0
    for i, how in enumerate(("<&- >&- 2>&-", ">&- 2>&-", "<&- 2>&-")):
        out = tmp_path / f"{i}.qblk"
        assert shell(prepared, out, "quantize", how)[0] in (0, 4)
        assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("line", LINES)
def test_a_file_size_limit_of_nothing(line: str, prepared: Path, tmp_path: Path) -> None:
    """Streams go to files too, so that not a word can be said."""
    how = f">{tmp_path}/out 2>{tmp_path}/err"
    code, _ = shell(prepared, tmp_path / "o.qblk", line, how, "ulimit -f 0;")
    assert code == UNTOLD[line]
    assert not (tmp_path / "o.qblk").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_thread_that_cannot_be_started(
    prepared: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a limit of processes, which does not hold for root."""
    # What a function has written before is no output of the command.
    qconvert.quantize(prepared / "m.safetensors", "q8_block32", output=tmp_path / "before.qblk")

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    line = ("quantize", prepared / "m.safetensors", "--scheme", "q8_block32", "--threads", 2)
    done = call(*line, "-o", tmp_path / "o.qblk")
    assert done.code == 4
    assert "resource temporarily unavailable; nothing was written" in done.err
    assert "ulimit -u" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["before.qblk"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_limit_of_processes_is_not_taken_for_an_interrupt(prepared: Path, tmp_path: Path) -> None:
    """OpenBLAS answers threads that it does not get with SIGINT to its own process."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        os.setgid(65534)
        os.setuid(65534)

    try:
        done = subprocess.run(
            [*COMMAND, "inspect", prepared / "m.safetensors", "--threads", "1"],
            env={k: v for k, v in environment().items() if not k.startswith("OPENBLAS")},
            preexec_fn=limit,
            capture_output=True,
            text=True,
            check=False,
        )
    except PermissionError:
        pytest.skip("another user cannot run this Python")
    if "ermission" in done.stderr or "No module" in done.stderr:
        pytest.skip("another user cannot read the checkout")
    assert done.returncode in (0, 4), done.stderr
    assert "OpenBLAS" not in done.stderr


# --- system calls ---------------------------------------------------------------------------------

NUMBERS = (errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``failing(name, number, when)`` makes a function of ``os`` fail where ``when`` says so."""

    def arm(name: str, number: int, when: Callable[..., bool]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            if when(*arguments, **more):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    yield arm
    monkeypatch.undo()


def of_model(path: object, *_: object, **__: object) -> bool:
    return str(path).endswith("m.safetensors")


def always(*_: object, **__: object) -> bool:
    return True


def of_open_model(fd: int, *_: object) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").endswith("m.safetensors")


CALLS = [("open", of_model), ("pread", of_open_model), ("fstat", of_open_model)]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("name", "when"), CALLS)
def test_a_call_on_the_source_that_fails_is_4_in_its_words(
    name: str,
    when: Callable[..., bool],
    number: int,
    prepared: Path,
    tmp_path: Path,
    call: Call,
    failing: Callable[..., None],
) -> None:
    failing(name, number, when)
    line = ("quantize", prepared / "m.safetensors", "--scheme", "q8_block32")
    done = call(*line, "-o", tmp_path / "o.qblk", "--json")
    assert done.code == 4, done
    assert f"{os.strerror(number).lower()} [FILE-IO]; nothing was written" in done.err
    assert str(prepared / "m.safetensors") in done.err
    assert done.json["error"]["exit"] == 4
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_listed_is_4(
    prepared: Path, call: Call, failing: Callable[..., None]
) -> None:
    failing("listdir", errno.EIO, always)
    done = call("inspect", prepared)
    assert done.code == 4
    assert f"{prepared}: input/output error" in done.err


def test_closing_what_was_only_read_cannot_fail(
    prepared: Path, call: Call, failing: Callable[..., None]
) -> None:
    failing("close", errno.EIO, always)
    assert call("inspect", prepared / "m.safetensors").code == 0


def test_an_error_after_the_file_has_its_name_says_that_it_is_complete(
    prepared: Path, tmp_path: Path, call: Call, failing: Callable[..., None]
) -> None:
    target = tmp_path / "o.qblk"
    failing("fsync", errno.EIO, lambda *_: target.exists())
    done = call("quantize", prepared / "m.safetensors", "--scheme", "q8_block32", "-o", target)
    assert done.code == 4
    assert "input/output error; o.qblk is complete" in done.err
    assert list(listing(tmp_path)) == ["o.qblk"]
    assert verify(target, VerifyOptions()).status == "pass"


def test_a_report_that_cannot_be_written_says_that_the_output_is_complete(
    prepared: Path, tmp_path: Path, call: Call, failing: Callable[..., None]
) -> None:
    target = tmp_path / "o.qblk"
    failing("pwrite", errno.ENOSPC, lambda *_: target.exists())
    line = ("quantize", prepared / "m.safetensors", "--scheme", "q8_block32", "-o", target)
    done = call(*line, "--report", tmp_path / "r.json")
    assert done.code == 4
    assert f"{tmp_path / 'r.json'}: no space left on device; o.qblk is complete" in done.err
    assert list(listing(tmp_path)) == ["o.qblk"]


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libx.so: cannot open shared object file: Too many open files"),
        ModuleNotFoundError("No module named 'gguf'"),
        MemoryError(),
        SystemError("error return without exception set"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_part_of_the_program_that_cannot_be_loaded_is_4(
    error: Exception, prepared: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "qconvert.commands.quantize":
            raise error
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    target = tmp_path / "o.qblk"
    done = call("quantize", prepared / "m.safetensors", "--scheme", "q8_block32", "-o", target)
    assert done.code == 4
    assert done.err.splitlines()[0].endswith("; nothing was written")
    assert len(done.err.splitlines()) <= 2


def test_a_program_that_cannot_be_loaded_at_all_is_4(tmp_path: Path) -> None:
    """The first import of the entry fails: a module of ours that raises takes its place."""
    program = (
        "import sys, importlib.abc\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'qconvert.cli.command': raise OSError(5, 'Input/output error')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from qconvert.cli.main import run\nrun()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert done.stderr.startswith("error: qconvert cannot be loaded, nothing was written: ")
    assert len(done.stderr.splitlines()) == 1


def test_stdout_says_what_refused_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(MachineError, match="no space left"):
            write_stdout(["a", "b"])


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_during_an_import_leaves_no_traceback(number: int, code: int, word: str) -> None:
    """The module that is imported sends the signal to its own process."""
    program = (
        "import sys, signal, types, importlib.abc, importlib.machinery\n"
        # A shell that runs the tests in the background has them ignore interrupts.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Loader(importlib.abc.Loader):\n"
        "    def create_module(self, spec): return None\n"
        f"    def exec_module(self, module): signal.raise_signal({int(number)})\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'qconvert.stages.inspect':\n"
        "            return importlib.machinery.ModuleSpec(name, Loader())\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from qconvert.cli.main import run\n"
        "sys.argv = ['qconvert', 'inspect', 'm']\nrun()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (code, f"{word}\n", "")


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    program = (
        "import signal, sys\n"
        "from qconvert.cli import main\n"
        "class D:\n"
        "    def __del__(self): signal.raise_signal(signal.SIGTERM)\n"
        "def work(arguments):\n"
        "    D()\n    raise SystemExit(0)\n"
        "import qconvert.cli.command as c\n"
        "c.run_process = work\n"
        "main.run()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (143, "terminated\n")


def test_signals_wait_for_the_end_of_the_block_and_a_second_one_need_not() -> None:
    seen: list[str] = []

    def handler(*_: object) -> None:
        seen.append("handled")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with held() as waiting:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert (seen, waiting.number) == ([], signal.SIGTERM)
        assert seen == ["handled"]
        with held(once=True) as waiting:
            signal.raise_signal(signal.SIGTERM)
            assert len(seen) == 1
            signal.raise_signal(signal.SIGTERM)
            assert len(seen) == 2
            waiting.number = None  # answered
        assert len(seen) == 2
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_ignored(prepared: Path) -> None:
    """As of a job that a shell has put into the background."""
    program = (
        "import signal, qconvert.cli.command as c\n"
        "from qconvert.cli import main\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "def work(arguments):\n"
        "    signal.raise_signal(signal.SIGINT)\n    raise SystemExit(0)\n"
        "c.run_process = work\nmain.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_entry_imports_next_to_nothing() -> None:
    """Until it runs, an interrupt shows Python's own traceback."""
    text = Path(entry.__file__).read_text()
    before_run = text[: text.index("def run()")]
    found = set(re.findall(r"^(?:import|from) (\S+)", before_run, re.MULTILINE))
    assert found == {"__future__", "os", "signal", "sys"}


def test_a_log_says_rate_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr("qconvert.cli.progress.time.monotonic", lambda: now[0])
    progress = LineProgress()
    progress.begin("verify", 400_000_000, "bytes")
    now[0] += 29
    progress.advance(1)  # too early for another line
    now[0] += 11
    progress.advance(99_999_999, "a.weight")  # a quarter in 40 s: 2.5 MB a second, 120 s left
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "verify: 400 MB",
        "verify: 100 MB of 400 MB, 2.5 MB a second, about 2.0 min left",
    ]
