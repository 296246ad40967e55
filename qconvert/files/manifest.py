"""Lists of files with their digests, as `sha256sum -c` reads them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from qconvert.errors import InputError
from qconvert.files import open_model
from qconvert.files.regular import file_sha256


def manifest(made: Path, home: Path, left: Collection[Path] = ()) -> bytes:
    """Digests of a file and of all others that belong to it, or of every file of a directory.

    Args:
        made: the file or directory.
        home: where the list will lie; names in it are relative to that.
        left: files that are not listed, being written while this is.

    Raises:
        InputError: a file cannot be read.
    """
    outside = {os.path.realpath(path) for path in left}
    lines = []
    for path in _files(made):
        if os.path.realpath(path) not in outside:
            name = os.fsencode(os.path.relpath(path, home))
            lines.append((name, file_sha256(path).encode()))
    return b"".join(_line(name, digest) for name, digest in sorted(lines))


def _files(made: Path) -> Iterator[Path]:
    if made.is_dir():
        for place, _, names in os.walk(made):
            yield from (Path(place) / name for name in names)
        return
    try:
        model = open_model(made)
    except InputError:
        yield made
        return
    try:
        several = len(model.sources) > 1
        yield from (made.parent / s.name for s in model.sources) if several else (made,)
    finally:
        model.close()


def _line(name: bytes, digest: bytes) -> bytes:
    """A line as GNU sha256sum writes and reads it, which escapes what would end it."""
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != name else b"") + digest + b"  " + escaped + b"\n"
