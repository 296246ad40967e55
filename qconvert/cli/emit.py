"""Where a report goes, and the exit code it gives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from qconvert.cli import colour
from qconvert.cli.earlier import Run
from qconvert.cli.exits import ExitCode
from qconvert.cli.outputs import OutputFiles
from qconvert.cli.progress import make_progress
from qconvert.cli.streams import tell, write_stdout
from qconvert.errors import UsageError
from qconvert.files.atomic import AtomicOutput
from qconvert.report import Report

R = TypeVar("R", bound=Report)


class Emitter:
    """Puts a report where the user wants it and turns its status into an exit code.

    Entered before the long work, so that a report file that cannot be written is found out at once.
    ``inputs`` are files that the report and the page ``html`` must not replace; those of an earlier
    run like this one they may.
    """

    def __init__(
        self,
        run: Run,
        json: bool,
        report: Path | None,
        force: bool,
        quiet: bool,
        strict: bool,
        inputs: Sequence[Path],
        html: Path | None = None,
    ) -> None:
        self.run = run
        self.json = json
        self.quiet = quiet
        self.strict = strict
        self.progress = make_progress(quiet)
        if report and html and report.resolve() == html.resolve():
            raise UsageError("--report and --html name the same file", found=str(html))
        self.files = OutputFiles((report, html), force=force, run=run, inputs=inputs)
        self.report, self.page = self.files.files

    def emit(
        self, report: R, text: Callable[[R], str | Iterable[str]], *, data: bool = False
    ) -> int:
        """Put it out.

        Args:
            text: what is printed without ``--json``.
            data: whether that is for programs.
        """
        if self.report:
            _write(self.report, report.json_parts())
        if self.page:
            from qconvert.page import document

            _write(self.page, document(report, self.run.line))
        if not self.quiet:
            for warning in report.warnings:
                tell(f"warning: {warning}")
        if self.strict and report.warnings:
            # Quiet or not: an exit code of 1 without a word would leave a script in the dark.
            told = f": {'; '.join(report.warnings)}" if self.quiet else ""
            count = len(report.warnings)
            which = "a warning is a failure" if count == 1 else f"{count} warnings are a failure"
            tell(f"failed: under --strict {which}{told}")
        parts = report.json_parts() if self.json else text(report)
        if not (self.json or data) and colour.wanted(sys.stdout):
            parts = colour.painted_text((parts,) if isinstance(parts, str) else parts)
        if not write_stdout(parts):
            return ExitCode.READER_GONE
        return ExitCode.DONE if report.status == "pass" else ExitCode.NO

    def __enter__(self) -> Emitter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.progress.end()  # or an error would leave the terminal without its cursor
        self.files.close()


def _write(file: AtomicOutput, parts: Iterable[str]) -> None:
    at = 0
    for part in parts:
        data = part.encode()
        file.write_at(at, data)
        at += len(data)
    file.commit()
