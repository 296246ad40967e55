"""Lists of files with their digests, as `sha256sum -c` reads them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from qconvert.errors import InputError
from qconvert.files import open_model
from qconvert.files.regular import file_sha256, os_refusal


def manifest(made: Path, home: Path, left: Collection[Path] = ()) -> bytes:
    """Digests of a file and of all others that belong to it, or of every file of a directory.

    Args:
        made: the file or directory.
        home: where the list will lie; names in it are relative to that.
        left: files that are not listed, being written while this is.

    Raises:
        InputError: a file cannot be read, or as of `check_listed`.
    """
    outside = {os.path.realpath(path) for path in left}
    lines = []
    for path in _files(made):
        if os.path.realpath(path) not in outside:
            name = os.fsencode(os.path.relpath(path, home))
            lines.append((name, file_sha256(path).encode()))
    return b"".join(_line(name, digest) for name, digest in sorted(lines))


def check_listed(made: Path) -> None:
    """Refuse a directory some of whose files would not be found: a list that says nothing of them
    would pass for one of all.

    Raises:
        InputError: a directory in it is a link, or cannot be read.
    """
    for _ in _inside(made):
        pass


def _inside(directory: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise os_refusal(Path(os.fsdecode(error.filename)), error) from error

    for place, below, names in os.walk(directory, onerror=refuse):
        for path in (Path(place) / name for name in below):
            if path.is_symlink():
                raise InputError(
                    "a link to a directory, whose files no list of digests would have",
                    path=path,
                    hint="put the directory itself in its place",
                )
        yield from (Path(place) / name for name in names)


def _files(made: Path) -> Iterator[Path]:
    if made.is_dir():
        yield from _inside(made)
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
