"""Reports that an earlier run of the same command wrote about the same input: a script that runs
again replaces its own, and nobody else's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qconvert.errors import LINE, printable

HEAD = 16_384  # bytes of a report within which it says what it is about; paths may be long


@dataclass(frozen=True, slots=True)
class Run:
    """What a report is about.

    Attributes:
        command: such as ``verify``.
        subject: the file or model that the command is given; None where there is none.
    """

    command: str
    subject: Path | None = None

    def wrote(self, target: Path) -> bool:
        """Whether a file is a report, page or JUnit file of a run like this one."""
        try:
            with target.open("rb") as f:
                head = f.read(HEAD).decode("utf-8", "replace")
        except OSError:
            return False
        subject = "" if self.subject is None else str(self.subject)
        if head.startswith("{"):
            about = json.dumps(subject) if subject else ""
            return f'"schema": "qconvert.{self.command}/' in head[:100] and about in head
        if head.startswith("<!doctype html>"):
            return f'content="{escape(self.line)}"' in head
        if head.startswith("<?xml"):
            # As ElementTree writes it; xml.sax would load what speaks HTTP, for 4 MB.
            name = escape(printable(subject, LINE), quote=False).replace('"', "&quot;")
            return f'name="qconvert {self.command}"' in head and f'name="{name}"' in head
        return False

    @property
    def line(self) -> str:
        """As a page describes itself."""
        about = "" if self.subject is None else f" {printable(str(self.subject))}"
        return f"qconvert {self.command}{about}"
