"""verify --rebuild: the recorded recipe, run again, has to give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qconvert import __version__
from qconvert.errors import UsageError
from qconvert.files import OpenModel, open_model
from qconvert.files.atomic import draft_directory
from qconvert.files.provenance import PROVENANCE, read_provenance
from qconvert.files.regular import RegularFile, file_sha256
from qconvert.model import Model, TensorInfo
from qconvert.report import Check
from qconvert.report.verify import REBUILD

CHUNK = 1 << 20
AGAIN = "again"  # begins the names of what is made again

Recipe = Mapping[str, Any]


def rebuilt(
    path: Path,
    against: Path,
    given: Mapping[str, Path | None],
    make: Callable[[Recipe, str, Path], object],
) -> Check:
    """Whether a file is what its recipe gives here and now.

    Args:
        path: the file, or directory.
        against: its source.
        given: files besides the source that a recipe may need, by its member: ``calibration`` and
            ``imatrix``.
        make: runs a recipe for a container and writes the output.

    Raises:
        UsageError: the recipe needs more than the file and ``given`` have.
    """
    with closing(open_model(path)) as made, closing(open_model(against)) as source:
        recipe = read_provenance(made)
        if not isinstance(recipe, dict) or not isinstance(recipe.get("options"), dict):
            raise UsageError(
                "--rebuild needs a file that says how it was made",
                found=f"{path}: no provenance of qconvert",
            )
        for member, option in (("repair", "--text"), ("finetune", "--finetune")):
            if member in recipe:
                raise UsageError(
                    f"--rebuild does not run {option} again",
                    found="a file that was made with it",
                    hint="what torch computes may differ between machines: make the file again "
                    "where it was made, and compare the two with cmp",
                )
        if told := _other_source(recipe, source):
            return Check(REBUILD, "fail", f"the source is not the one that is recorded: {told}")
        _check_given(recipe, given)
        with draft_directory(path) as place:
            again = place / (path.name if path.is_dir() else f"{AGAIN}{path.suffix}")
            make(recipe, made.kind, again)
            told = _difference(path, made, again)
    version = _version(recipe)
    if told is None:
        return Check(REBUILD, "pass", f"the recorded recipe gives the same bytes again{version}")
    return Check(REBUILD, "fail", f"the recorded recipe gives other bytes{version}: {told}")


def _other_source(recipe: Recipe, source: OpenModel) -> str | None:
    """How the source differs from what is recorded of it."""
    noted = recipe.get("sources")
    if not isinstance(noted, list):
        return "the file records no sources"
    if len(noted) != len(source.sources):
        return f"{len(source.sources)} files, where {len(noted)} are recorded"
    for was, file in zip(noted, source.sources, strict=True):
        found = {"name": file.name, "size": file.size, "header_sha256": file.header_sha256}
        for key, value in found.items():
            if not isinstance(was, dict) or was.get(key) != value:
                recorded = was.get(key) if isinstance(was, dict) else was
                return f"{key} of '{file.name}' is {value}, recorded {recorded}"
        if "sha256" in was:
            home = source.path if source.path.is_dir() else source.path.parent
            digest = file_sha256(home / file.name)
            if was["sha256"] != digest:
                return f"sha256 of '{file.name}' is {digest}, recorded {was['sha256']}"
    return None


def _check_given(recipe: Recipe, given: Mapping[str, Path | None]) -> None:
    """Hold the files that a recipe needs against their recorded digests.

    Raises:
        UsageError: one is missing, another one, or not needed.
    """
    for member, path in given.items():
        option = f"--{member}"
        noted = recipe.get(member)
        if noted is None:
            if path:
                raise UsageError(f"{option}: the file was made without one", found=str(path))
            continue
        digest = noted.get("sha256") if isinstance(noted, dict) else None
        if path is None:
            raise UsageError(
                f"--rebuild needs the {member} that the file was made with",
                wanted=f"{option} FILE with SHA-256 {digest}",
            )
        if (found := file_sha256(path)) != digest:
            raise UsageError(
                f"{option} is not the one that the file was made with",
                found=f"SHA-256 {found}",
                wanted=str(digest),
            )


def _version(recipe: Recipe) -> str:
    tool, here = recipe.get("tool"), f"qconvert {__version__}"
    return "" if tool == here else f" (made by {tool}, run again by {here})"


def _difference(path: Path, made: OpenModel, again: Path) -> str | None:
    """The first thing that differs between a file and what was made again, in words."""
    pairs = list(_files(path, made, again))
    for old, new in pairs:
        if old is None or new is None:
            return f"only one of them has a file '{(old or new or path).name}'"
    if all(_same_bytes(old, new) for old, new in pairs if old and new):
        return None
    with closing(open_model(_first(again))) as other:
        return _of_models(made, other)


def _first(again: Path) -> Path:
    """The output itself, or the first file of a split one."""
    if again.exists():
        return again
    return min(_made(again))


def _files(path: Path, made: OpenModel, again: Path) -> Iterator[tuple[Path | None, Path | None]]:
    """Files of both, side by side."""
    if path.is_dir():
        before, now = (
            {p.relative_to(d) for p in d.rglob("*") if p.is_file()} for d in (path, again)
        )
        for name in sorted(before | now):
            yield (path / name if name in before else None), (again / name if name in now else None)
        return
    old = [path] if len(made.sources) == 1 else [path.parent / s.name for s in made.sources]
    yield from zip_longest(sorted(old), _made(again))


def _made(again: Path) -> list[Path]:
    """The files of an output, which is one or several."""
    return sorted(again.parent.glob(f"{AGAIN}*"))


def _same_bytes(old: Path, new: Path) -> bool:
    one = RegularFile(old)
    other = RegularFile(new)
    try:
        return one.size == other.size and all(
            one.read(at, min(CHUNK, one.size - at)) == other.read(at, min(CHUNK, one.size - at))
            for at in range(0, one.size, CHUNK)
        )
    finally:
        one.close()
        other.close()


def _of_models(made: OpenModel, other: OpenModel) -> str:
    """What differs: tensors first, for what is recorded of them differs with them."""
    wanted = {t.name: t for t in other.tensors}
    for t in made.tensors:
        new = wanted.pop(t.name, None)
        if new is None:
            return f"tensor '{t.name}' is not made again"
        if (t.dtype, t.shape) != (new.dtype, new.shape):
            return f"tensor '{t.name}' is {t.dtype}, made again {new.dtype}"
        if not _same_tensor(made, t, other, new):
            return f"tensor '{t.name}' is the first that has other bytes"
    if wanted:
        return f"tensor '{min(wanted)}' is not in the file"
    old, new_notes = read_provenance(made), read_provenance(other)
    for key in sorted(set(old) | set(new_notes)):
        if old.get(key) != new_notes.get(key):
            return (
                f"tensors are equal; {key} is recorded as {old.get(key)}, now {new_notes.get(key)}"
            )
    for key in sorted(set(made.metadata) | set(other.metadata) - {PROVENANCE}):
        if made.metadata.get(key) != other.metadata.get(key):
            return f"tensors are equal; metadata '{key}' differs"
    return "tensors and metadata are equal; the layout or a companion file differs"


def _same_tensor(made: Model, old: TensorInfo, other: Model, new: TensorInfo) -> bool:
    return old.nbytes == new.nbytes and all(
        made.raw(old, at, min(CHUNK, old.nbytes - at))
        == other.raw(new, at, min(CHUNK, new.nbytes - at))
        for at in range(0, old.nbytes, CHUNK)
    )
