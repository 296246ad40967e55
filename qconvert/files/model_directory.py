"""What belongs to a model directory: files that are read of it, and those that an output has."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# What a model directory is read for; results of ours may lie there too and may be replaced.
INPUT_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})
MODULE_DEPTH = 2  # directories below a model's in which its files lie: 1_Pooling, 0_Transformer/x
CONFIG = "config.json"
WEIGHTS = ".safetensors"
_OF_SEVERAL = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


def input_files(path: Path) -> Iterator[Path]:
    """What is read where ``path`` is given: a file and those that go with it, or a directory's."""
    if path.is_dir():
        for depth in range(MODULE_DEPTH + 1):
            found = path.glob("*/" * depth + "*")
            yield from (f for f in found if f.suffix in INPUT_SUFFIXES)
        return
    yield path
    split = _OF_SEVERAL.fullmatch(path.name)
    if split:
        yield from path.parent.glob(f"{glob.escape(split[1])}-*-of-{split[2]}.gguf")


def lies_in(path: Path, directory: Path) -> bool:
    """Whether what ``path`` leads to is ``directory`` or lies anywhere in it."""
    real = Path(os.path.realpath(path))
    for above in (real, *real.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            if above.samefile(directory):
                return True
    return False


def foreign_entry(directory: Path) -> str | None:
    """What tells a directory from the outputs of qconvert, for people; None for an output.

    An output has a configuration and safetensors files at its top, and nothing but such files as a
    model is read for, in at most so many directories as those lie in. What was downloaded has
    others, ``.gitattributes`` or ``.cache``, and what somebody has added mostly too: a directory
    that is replaced is gone with all that is in it. An empty one is like an output.

    Raises:
        OSError: it cannot be read.
    """
    names = os.listdir(directory)
    if not names:
        return None
    foreign = next(_foreign(directory, MODULE_DEPTH), None)
    if foreign is not None:
        return f"'{foreign.relative_to(directory)}'"
    if CONFIG not in names:
        return f"no {CONFIG}"
    if not any(name.endswith(WEIGHTS) for name in names):
        return f"no {WEIGHTS} file"
    return None


def _foreign(directory: Path, depth: int) -> Iterator[Path]:
    """Entries that no output has, links among them."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False) and depth:
                yield from _foreign(path, depth - 1)
            elif not entry.is_file(follow_symlinks=False) or path.suffix not in INPUT_SUFFIXES:
                yield path
