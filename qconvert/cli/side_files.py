"""Files that `verify` writes besides its report: JUnit's XML, and a list of digests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qconvert.cli.earlier import Run
from qconvert.cli.outputs import OutputFiles
from qconvert.cli.streams import tell
from qconvert.errors import UsageError, printable
from qconvert.files.manifest import check_listed, manifest
from qconvert.report import VerifyReport
from qconvert.report.junit import junit_xml


class SideFiles:
    """Outputs that are opened before the long work, and get their names after it.

    Args:
        file: what is verified.
        junit, listed: the outputs, where they are asked for.
        others: outputs of the same run, which must not be one of them.
        force: whether existing ones may be replaced; those of an earlier `Run` like this one may
            be anyway, but for the list, which is of a release.
        inputs: what must not be written over.

    Raises:
        UsageError: two outputs have one name.
        InputError: not all of a directory's files can be listed.
    """

    def __init__(
        self,
        file: Path,
        junit: Path | None,
        listed: Path | None,
        others: Sequence[Path | None],
        *,
        force: bool,
        inputs: Sequence[Path],
    ) -> None:
        names = [os.path.realpath(p) for p in (junit, listed, *others) if p]
        if len(set(names)) < len(names):
            raise UsageError("--junit, --manifest, --report and --html are files of their own")
        if listed and file.is_dir():
            check_listed(file)  # now, not after the weights
        self.file = file
        self.files = OutputFiles(
            (junit, listed), force=force, run=Run("verify", file), inputs=inputs
        )
        self.junit, self.manifest = self.files.files

    def write(self, report: VerifyReport, left: Sequence[Path]) -> None:
        """Write what was asked for; digests of what is good alone, for it is a release's list. That
        there is none is said, quiet or not, for an older one may be there.

        Args:
            left: other files of this run, which are not listed.
        """
        if self.junit:
            self.junit.write_at(0, junit_xml(report))
            self.junit.commit()
        if self.manifest and report.status != "pass":
            name = printable(str(self.manifest.target))
            kept = f"; {name} is as it was before" if self.manifest.target.exists() else ""
            tell(f"no list of digests was written: the report is no pass{kept}")
        elif self.manifest:
            target = self.manifest.target
            left = [*self.files.paths, *left]
            self.manifest.write_at(0, manifest(self.file, target.parent, left))
            self.manifest.commit()

    def __enter__(self) -> SideFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.files.close()
