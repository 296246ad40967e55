"""Files of the repository that a script makes, and that are to be what it would make now."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def write_or_check(documents: dict[Path, str], script: str) -> int:
    """Write what is not current, or under ``--check`` say so; the exit code of the script."""
    stale = {
        path: text
        for path, text in documents.items()
        if not path.exists() or path.read_text("utf-8") != text
    }
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current: python {script}")
        return 1 if stale else 0
    for path, text in stale.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0
