"""One command line from its words to its exit code: errors, signals, and what became of outputs."""

from __future__ import annotations

import gc
import io
import os
import shlex
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from qconvert import __version__
from qconvert.cli import colour
from qconvert.cli.completion import VARIABLE
from qconvert.cli.exits import ExitCode, as_refusal, code_of
from qconvert.cli.streams import (
    abandon_stdout,
    prepare_streams,
    stdout_refusal,
    tell,
    write_stdout,
)
from qconvert.errors import (
    LINE,
    MachineError,
    OutputExistsError,
    QconvertError,
    Stopped,
    Terminated,
    printable,
)

WRITING = ("quantize", "calibrate", "tune")  # commands whose work is a file
HELP = {"-h", "--help"}
GARBAGE = 200_000  # new objects before Python looks for cycles among them; by default 700


def run_process(arguments: list[str]) -> NoReturn:
    """Run a command line as a process of its own, and end it."""
    prepare_streams()
    gc.set_threshold(GARBAGE)  # among the many objects of a large header are hardly any cycles
    if not (sys.warnoptions or _debug(arguments) or HELP & set(arguments)):
        _silence_libraries()
    try:
        code = main(arguments)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the work is done: too late to stop it
    except KeyboardInterrupt:
        code = _ended("interrupted", ExitCode.INTERRUPTED)
    except Terminated:
        code = _ended("terminated", ExitCode.TERMINATED)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk behind stdout; the interpreter's own flush would exit with 120
        abandon_stdout()
        code = code or ExitCode.MACHINE
    sys.exit(code)


def _silence_libraries() -> None:
    """No warnings and logs of theirs: what a person is to know is said in a warning of ours."""
    warnings.simplefilter("ignore")
    import logging

    logging.disable()


def main(arguments: list[str]) -> int:
    """Run a command line and return its exit code; nothing escapes but the code."""
    _forget_outputs()  # of Python functions that this process has called before
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not know every letter
    try:
        colour.choose(arguments)
        return _run(arguments)
    except Stopped as e:
        return _stopped(e, arguments)
    except KeyboardInterrupt:
        return _ended("interrupted", ExitCode.INTERRUPTED)
    except Terminated:
        return _ended("terminated", ExitCode.TERMINATED)
    except Exception as e:
        if _debug(arguments):
            traceback.print_exc()
        return _refused(as_refusal(e), arguments)
    finally:
        _clean_up()


def _debug(arguments: list[str]) -> bool:
    return "--debug" in arguments or bool(os.environ.get("QCONVERT_DEBUG"))


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:  # parsing an option costs Typer 0.2 s
        return ExitCode.DONE if write_stdout(f"qconvert {__version__}\n") else ExitCode.READER_GONE
    from qconvert.cli.app import app

    completing = VARIABLE in os.environ
    if not arguments and not completing:
        sys.stdout, stdout = sys.stderr, sys.stdout
        app(["--help"], prog_name="qconvert", standalone_mode=False)
        sys.stdout = stdout
        return ExitCode.USAGE
    if not completing and not HELP & set(arguments):
        _load_numpy()
    try:
        result = app(arguments, prog_name="qconvert", standalone_mode=False)
    except SystemExit:
        # Typer's answer to a shell's question, or to a closed pipe, where the report did not meet
        # it first.
        return ExitCode.DONE if completing else ExitCode.READER_GONE
    except OSError as e:
        if e.filename is None and HELP & set(arguments):
            raise stdout_refusal(e) from e
        raise
    except Exception as e:
        # Typer's own refusals, whichever click it carries: they know how to show themselves.
        if not (hasattr(e, "show") and hasattr(e, "exit_code")):
            raise
        shown = io.StringIO()
        e.show(file=shown)
        for line in shown.getvalue().splitlines():
            tell(line)
        return ExitCode.USAGE
    if result == ExitCode.INTERRUPTED:  # Typer has taken the interrupt
        raise KeyboardInterrupt
    return result if isinstance(result, int) else ExitCode.DONE


def _load_numpy() -> None:
    """Import NumPy with a BLAS of one thread: where the machine allows no more, OpenBLAS sends the
    process an interrupt. Where more are wanted, `threadpoolctl` starts them.
    """
    variable = "OPENBLAS_NUM_THREADS"
    if variable in os.environ or "numpy" in sys.modules:
        return
    os.environ[variable] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[variable]  # it is not for torch


def _clean_up() -> None:
    atomic = sys.modules.get("qconvert.files.atomic")
    if atomic is not None:
        atomic.remove_partial_files()
    _forget_outputs()


def _forget_outputs() -> None:
    atomic = sys.modules.get("qconvert.files.atomic")
    if atomic is not None:
        atomic.completed.clear()


def _ended(how: str, code: ExitCode) -> int:
    tell(how)
    return code


def _stopped(stop: Stopped, arguments: list[str]) -> int:
    """A run that was stopped and can go on: where, and with which command."""
    how, code = {
        signal.SIGINT: ("interrupted", ExitCode.INTERRUPTED),
        signal.SIGTERM: ("terminated", ExitCode.TERMINATED),
    }[signal.Signals(stop.number)]
    tell(f"{how}: {stop}")
    again = arguments if "--resume" in arguments else [*arguments, "--resume"]
    line = shlex.join(["qconvert", *again])
    if len(line) > LINE // 2 or not line.isprintable():
        line = "the same command with --resume"
    tell(f"  hint: go on with: {line}")
    return code


def _refused(error: QconvertError, arguments: list[str]) -> int:
    """One line on stderr, the hint below it, and the same as JSON where it was asked for."""
    code = code_of(error)
    tell(f"error: {error}{_outcome(error, arguments)}")
    if error.hint:
        tell(f"  hint: {error.hint}")
    if "--json" in arguments and code != ExitCode.USAGE:
        from qconvert.report import dump, error_json

        with suppress(MachineError):  # stdout itself may be what failed
            if not write_stdout(dump(error_json(error, code))):
                return ExitCode.READER_GONE
    return code


def _outcome(error: QconvertError, arguments: list[str]) -> str:
    """What became of the outputs when the machine refused."""
    if not isinstance(error, MachineError) or isinstance(error, OutputExistsError):
        return ""
    atomic = sys.modules.get("qconvert.files.atomic")
    done: list[Path] = [] if atomic is None else atomic.completed
    if done:
        return f"; {printable(done[-1].name, 60)} is complete"
    writes = bool(arguments) and (arguments[0] in WRITING or "--report" in arguments)
    return "; nothing was written" if writes else ""
