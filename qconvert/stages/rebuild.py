"""verify --rebuild: the recorded recipe, run again, has to give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qconvert import __version__
from qconvert.errors import FormatError, UsageError
from qconvert.files import OpenModel, open_model
from qconvert.files.adapters import adapter_sha256
from qconvert.files.atomic import draft_directory
from qconvert.files.beside import is_temporary
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.files.provenance import PROVENANCE, read_provenance
from qconvert.files.regular import RegularFile, file_sha256
from qconvert.model import Model, TensorInfo
from qconvert.report import Check
from qconvert.report.verify import REBUILD, SAME_BYTES

CHUNK = 1 << 20
AGAIN = "again"  # begins the names of what is made again
NAME = "general.name"  # of a GGUF file: that of its source's directory
SHOWN = 3  # names of files in a directory that are not made again


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a file says that it was made.

    Attributes:
        path: the file, or directory.
        container: its kind, as `OpenModel` has it.
        noted: its provenance, whose member ``options`` is an object; nothing else is checked.
    """

    path: Path
    container: str
    noted: Mapping[str, Any]


def recorded_recipe(path: Path, given: Mapping[str, Path | None]) -> Recipe | None:
    """The recipe of a file, if what it needs was given; None where the file is damaged, which
    `verify` has to find out and to say.

    Args:
        path: the file, or directory.
        given: files besides the source that a recipe may need, by its member: ``calibration``,
            ``imatrix`` and ``adapter``, a directory.

    Raises:
        UsageError: the recipe needs more than the file and ``given`` have.
        InputError: there is no such file, or none of a kind that is read.
    """
    try:
        with closing(open_model(path)) as made:
            container, noted = made.kind, read_provenance(made)
    except FormatError:
        return None
    if not isinstance(noted, dict) or not isinstance(noted.get("options"), dict):
        raise UsageError(
            "--rebuild needs a file that says how it was made",
            found=f"{path}: no provenance of qconvert",
        )
    for member, option in (("repair", "--text"), ("finetune", "--finetune")):
        if member in noted:
            raise UsageError(
                f"--rebuild does not run {option} again",
                found="a file that was made with it",
                hint="what torch computes may differ between machines: make the file again "
                "where it was made, and compare the two with cmp",
            )
    _check_given(noted, given)
    if path.name in ("", ".."):  # something is to be made beside it
        path = path.resolve()
    return Recipe(path, container, noted)


def rebuilt(recipe: Recipe, against: Path, make: Callable[[Recipe, Path], object]) -> Check:
    """Whether a file is what its recipe gives here and now.

    Args:
        recipe: see `recorded_recipe`.
        against: the file's source.
        make: runs a recipe and writes the output.
    """
    path = recipe.path
    with closing(open_model(path)) as made, closing(open_model(against)) as source:
        if told := _other_source(recipe.noted, source):
            return Check(REBUILD, "fail", f"the source is not the one that is recorded: {told}")
        with draft_directory(path) as place:
            again = place / (path.name if path.is_dir() else f"{AGAIN}{path.suffix}")
            make(recipe, again)
            return _compared(path, made, again, _version(recipe.noted))


def _other_source(noted: Mapping[str, Any], source: OpenModel) -> str | None:
    """How the source differs from what is recorded of it."""
    sources = noted.get("sources")
    if not isinstance(sources, list):
        return "the file records no sources"
    if len(sources) != len(source.sources):
        return f"{len(source.sources)} files, where {len(sources)} are recorded"
    for was, file in zip(sources, source.sources, strict=True):
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


def _check_given(recipe: Mapping[str, Any], given: Mapping[str, Path | None]) -> None:
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
                wanted=f"{option} {'DIR' if member == 'adapter' else 'FILE'} with SHA-256 {digest}",
            )
        found = adapter_sha256(path) if member == "adapter" else file_sha256(path)
        if found != digest:
            raise UsageError(
                f"{option} is not the one that the file was made with",
                found=f"SHA-256 {found}",
                wanted=str(digest),
            )


def _version(recipe: Mapping[str, Any]) -> str:
    tool, here = recipe.get("tool"), f"qconvert {__version__}"
    return "" if tool == here else f" (made by {tool}, run again by {here})"


def _compared(path: Path, made: OpenModel, again: Path, version: str) -> Check:
    """A file held against what was made again."""
    pairs, others = _files(path, made, again)
    left = f"; not of it: {_few(others)}" if others else ""
    if all(old and new and _same_bytes(old, new) for old, new in pairs):
        return Check(REBUILD, "pass", f"{SAME_BYTES}{version}{left}")
    told = _of_files(pairs)
    if told is None:
        with closing(open_model(_first(again))) as other:
            told = _of_models(made, other)
            here, noted = other.metadata.get(NAME), made.metadata.get(NAME)
    if told is None:
        return Check(
            REBUILD,
            "pass",
            f"the recorded recipe gives the same tensors and metadata again{version}, but for "
            f"{NAME}, which is that of the source's directory: '{noted}', here '{here}'",
        )
    return Check(REBUILD, "fail", f"the recorded recipe gives other bytes{version}: {told}{left}")


def _of_files(pairs: Sequence[tuple[Path | None, Path | None]]) -> str | None:
    """The first file that only one of them has, in words."""
    for old, new in pairs:
        if old is None and new:
            return f"'{new.name}' is made again and not there"
        if old and new is None:
            return f"'{old.name}' is not made again"
    return None


def _few(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _first(again: Path) -> Path:
    """The output itself, or the first file of a split one."""
    if again.exists():
        return again
    return min(_made(again))


def _files(
    path: Path, made: OpenModel, again: Path
) -> tuple[list[tuple[Path | None, Path | None]], list[str]]:
    """Files of both, side by side, and names of those in a directory that no recipe makes."""
    if path.is_dir() and not again.is_dir():
        return [(path, None)], []
    if path.is_dir():
        before, now = (
            {p.relative_to(d) for p in d.rglob("*") if p.is_file()} for d in (path, again)
        )
        pairs = [((path / n if n in before else None), again / n) for n in sorted(now)]
        return [*pairs], [str(n) for n in sorted(before - now) if not is_temporary(n.name)]
    old = [path] if len(made.sources) == 1 else [path.parent / s.name for s in made.sources]
    return [*zip_longest(sorted(old), _made(again))], []


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


def _of_models(made: OpenModel, other: OpenModel) -> str | None:
    """What differs: tensors first, for what is recorded of them differs with them; None where it is
    the name alone that a model has of its source's directory.
    """
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
    differing = [
        key
        for key in sorted((set(made.metadata) | set(other.metadata)) - {PROVENANCE})
        if _value(made, key) != _value(other, key)
    ]
    order = [[t.name for t in model.tensors] for model in (made, other)]
    if isinstance(made, AnyGgufModel) and differing == [NAME] and order[0] == order[1]:
        return None
    if differing:
        return f"tensors are equal; metadata '{differing[0]}' differs"
    return "tensors and metadata are equal; the layout or a companion file differs"


def _value(model: OpenModel, key: str) -> object:
    """Of a key in the metadata, with its type; None where it is not there."""
    if key in model.metadata and isinstance(model, AnyGgufModel):
        return model.value(key)  # of an array the metadata have the length alone
    return model.metadata.get(key)


def _same_tensor(made: Model, old: TensorInfo, other: Model, new: TensorInfo) -> bool:
    return old.nbytes == new.nbytes and all(
        made.raw(old, at, min(CHUNK, old.nbytes - at))
        == other.raw(new, at, min(CHUNK, new.nbytes - at))
        for at in range(0, old.nbytes, CHUNK)
    )
