"""The way in and every way out: signals, errors, exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

from qconvert.cli.exits import ExitCode, code_of
from qconvert.errors import MachineError, QconvertError, Terminated, printable


def run() -> NoReturn:
    """The ``qconvert`` command."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run a command line and return its exit code; nothing escapes but the code."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in arguments or bool(os.environ.get("QCONVERT_DEBUG"))
    try:
        return _run(arguments)
    except QconvertError as e:
        if debug:
            traceback.print_exc()
        return _refused(e, arguments)
    except KeyboardInterrupt:
        return _ended("interrupted", ExitCode.INTERRUPTED)
    except Terminated:
        return _ended("terminated", ExitCode.TERMINATED)
    except BrokenPipeError:
        # The interpreter flushes stdout at exit and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.READER_GONE
    except MemoryError:
        return _refused(MachineError("out of memory"), arguments)
    except OSError as e:
        if debug:
            traceback.print_exc()
        text = (e.strerror or str(e)).lower()
        return _refused(MachineError(text, path=e.filename), arguments)
    except Exception as e:
        if debug:
            traceback.print_exc()
        print(
            f"error: a bug in qconvert: {type(e).__name__}: {printable(str(e))}\n"
            "  hint: set QCONVERT_DEBUG=1 for the traceback, and report it with the command line",
            file=sys.stderr,
        )
        return ExitCode.BUG
    finally:
        _clean_up()
        signal.signal(signal.SIGTERM, previous)


def _run(arguments: list[str]) -> int:
    from qconvert.cli.app import app

    if not arguments:
        arguments = ["--help"]
        sys.stdout = sys.stderr
        app(arguments, standalone_mode=False)
        return ExitCode.USAGE
    try:
        result = app(arguments, prog_name="qconvert", standalone_mode=False)
    except Exception as e:
        # Typer's own refusals, whichever click it carries: they know how to show themselves.
        if not (hasattr(e, "show") and hasattr(e, "exit_code")):
            raise
        e.show()
        return ExitCode.USAGE
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


def _refused(error: QconvertError, arguments: list[str]) -> int:
    """One line on stderr, the hint below it, and the same as JSON where it was asked for."""
    code = code_of(error)
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {printable(error.hint)}", file=sys.stderr)
    if "--json" in arguments and code != ExitCode.USAGE:
        from qconvert.report import dump, error_json

        try:
            sys.stdout.write(dump(error_json(error, code)))
            sys.stdout.flush()
        except BrokenPipeError:
            return ExitCode.READER_GONE
    return code
