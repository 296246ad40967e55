"""The way in and every way out: signals, errors, exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

from qconvert import __version__
from qconvert.cli.exits import ExitCode, code_of
from qconvert.errors import MachineError, QconvertError, Terminated, printable


def run() -> NoReturn:
    """The ``qconvert`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main(sys.argv[1:])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the work is done: too late to stop it
    except KeyboardInterrupt:
        code = _ended("interrupted", ExitCode.INTERRUPTED)
    except Terminated:
        code = _ended("terminated", ExitCode.TERMINATED)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk behind stdout; the interpreter's own flush would exit with 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or ExitCode.MACHINE
    sys.exit(code)


def main(arguments: list[str]) -> int:
    """Run a command line and return its exit code; nothing escapes but the code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not know every letter
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _ended("interrupted", ExitCode.INTERRUPTED)
    except Terminated:
        return _ended("terminated", ExitCode.TERMINATED)
    except Exception as e:
        if "--debug" in arguments or os.environ.get("QCONVERT_DEBUG"):
            traceback.print_exc()
        return _refused(_as_refusal(e), arguments)
    finally:
        _clean_up()


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:  # parsing an option costs Typer 0.2 s
        from qconvert.cli.render import write_stdout

        return ExitCode.DONE if write_stdout(f"qconvert {__version__}\n") else ExitCode.READER_GONE
    from qconvert.cli.app import app

    if not arguments:
        sys.stdout, stdout = sys.stderr, sys.stdout
        app(["--help"], prog_name="qconvert", standalone_mode=False)
        sys.stdout = stdout
        return ExitCode.USAGE
    try:
        result = app(arguments, prog_name="qconvert", standalone_mode=False)
    except SystemExit:  # Typer's answer to a closed pipe, where the report did not meet it first
        return ExitCode.READER_GONE
    except Exception as e:
        # Typer's own refusals, whichever click it carries: they know how to show themselves.
        if not (hasattr(e, "show") and hasattr(e, "exit_code")):
            raise
        e.show()
        return ExitCode.USAGE
    if result == ExitCode.INTERRUPTED:  # Typer has taken the interrupt
        raise KeyboardInterrupt
    return result if isinstance(result, int) else ExitCode.DONE


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _clean_up() -> None:
    atomic = sys.modules.get("qconvert.files.atomic")
    if atomic is not None:
        atomic.remove_partial_files()


def _ended(how: str, code: ExitCode) -> int:
    print(how, file=sys.stderr)
    return code


def _as_refusal(e: Exception) -> QconvertError:
    """Any exception as a refusal: the machine's, or a bug of ours."""
    if isinstance(e, QconvertError):
        return e
    if isinstance(e, MemoryError):
        return MachineError("out of memory")
    if isinstance(e, OSError):
        return MachineError((e.strerror or str(e)).lower(), path=e.filename)
    return QconvertError(
        f"a bug in qconvert: {type(e).__name__}: {e}",
        hint="set QCONVERT_DEBUG=1 for the traceback, and report it with the command line",
    )


def _refused(error: QconvertError, arguments: list[str]) -> int:
    """One line on stderr, the hint below it, and the same as JSON where it was asked for."""
    code = code_of(error)
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {printable(error.hint)}", file=sys.stderr)
    if "--json" in arguments and code != ExitCode.USAGE:
        from qconvert.cli.render import write_stdout
        from qconvert.report import dump, error_json

        try:
            if not write_stdout(dump(error_json(error, code))):
                return ExitCode.READER_GONE
        except OSError:
            return code  # stdout itself may be what failed
    return code
