"""Writing files so that their names are old, absent or complete, whatever happens."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qconvert.errors import MachineError, OutputExistsError
from qconvert.files import beside
from qconvert.files.beside import remove_partial_files
from qconvert.files.model_directory import foreign_entry, input_files, lies_in
from qconvert.interrupts import held

__all__ = [
    "AtomicDirectory",
    "AtomicOutput",
    "AtomicSet",
    "check_space",
    "check_target",
    "completed",
    "draft_directory",
    "machine_errors",
    "remove_partial_files",
]

HINTS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "the disk quota is used up; write to another disk",
    errno.EFBIG: "the file size limit (ulimit -f) or the file system does not allow it",
    errno.EACCES: "choose a directory you may write to",
    errno.EROFS: "choose a directory you may write to",
    errno.ENOENT: "create the directory first",
    errno.EMFILE: "raise the limit: ulimit -n 4096",
}

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
MAX_NAME_BYTES = 255  # of the file systems that matter

AFTER = "its directory could not be flushed: "

# Outputs that this process has completed, for what is to be said when something fails later.
completed: list[Path] = []


@contextmanager
def machine_errors(path: Path, doing: str = "") -> Iterator[None]:
    """Turn an OSError into the MachineError that names the file, and what was being done to it."""
    try:
        yield
    except OSError as e:
        text = doing + (e.strerror or str(e)).lower()
        raise MachineError(text, path=path, hint=HINTS.get(e.errno or 0)) from e


class AtomicOutput:
    """A file under construction beside its target.

    Opened before any long work, so that an unwritable directory costs no time. ``commit`` makes it
    durable and moves it to its name; leaving the ``with`` block without it removes it. Several
    runs may write one target at a time: the last that commits has it.

    Args:
        target: the final name.
        overwrite: whether an existing target may be replaced.
        inputs: files, or model directories, that must not be written over, by any spelling or link.
        interim: no output of the run, but something that it will remove.

    Raises:
        OutputExistsError: the target exists and ``overwrite`` is False.
        MachineError: the target is an input or not a regular file, or the directory refuses.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool,
        inputs: Sequence[Path] = (),
        interim: bool = False,
    ) -> None:
        self.target = target
        self.overwrite = overwrite
        self.interim = interim
        with machine_errors(target):
            _check_name(target)
            beside.remove_leftovers(target)
            check_target(target, overwrite, inputs)
            self.path, self.fd = beside.temporary_file(target)
        self._open = True

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` at a position of the file."""
        view = memoryview(data)
        with machine_errors(self.target):
            while view:
                done = os.pwrite(self.fd, view, offset)
                view = view[done:]
                offset += done

    def write(self, parts: Iterable[bytes]) -> None:
        """Write a whole file, piece by piece."""
        at = 0
        for part in parts:
            self.write_at(at, part)
            at += len(part)

    def truncate(self, size: int) -> None:
        with machine_errors(self.target):
            os.ftruncate(self.fd, size)

    def commit(self) -> None:
        """Flush to the disk and give the file its name."""
        with machine_errors(self.target):
            os.fsync(self.fd)
        with held():
            with machine_errors(self.target):
                _take_name(self.path, self.target, self.overwrite)
            if not self.interim:
                completed.append(self.target)
            with machine_errors(self.target, AFTER):
                _flush(self.target.parent)
                self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            beside.finished(self.path)
            os.close(self.fd)

    def __enter__(self) -> AtomicOutput:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._open:
            beside.remove(self.path)
            with suppress(OSError):  # nothing of it was to stay
                self._close()


class _Together(ABC):
    """Outputs that get their names together, under construction in a directory beside them.

    ``commit`` flushes all of them before the first gets its name. The first of several, without
    which nobody takes the others for anything, is the first to lose and the last to get its name:
    whatever ends the run between the two, it is absent, and the next run to it puts the old ones
    back. An error puts them back at once.

    Args:
        name: what the whole would be called if it were one file.
        targets: the final names, in one directory.
        overwrite, inputs: as of `AtomicOutput`.
    """

    interim = False  # as of `AtomicOutput`

    def __init__(
        self, name: Path, targets: Sequence[Path], *, overwrite: bool, inputs: Sequence[Path]
    ) -> None:
        self.name = name
        self.targets = tuple(targets)
        self.overwrite = overwrite
        self._inputs = tuple(inputs)
        with machine_errors(name):
            for target in targets:
                _check_name(target)
            beside.remove_leftovers(name)
            with beside.turn(name):  # what another run is replacing has no name for a moment
                for target in targets:
                    self._check(target)
            self.directory, self._lock = beside.temporary_directory(name)
        self.paths = tuple(self.directory / target.name for target in targets)
        self._taken: list[tuple[Path, Path]] = []
        self._open = True

    @abstractmethod
    def _check(self, target: Path) -> None:
        """Refuse a target that exists and may not be replaced."""

    @abstractmethod
    def _flush(self, path: Path) -> None:
        """Have the disk hold one of the outputs."""

    @abstractmethod
    def _take_name(self, path: Path, target: Path) -> None:
        """Give one of the outputs its name; nothing that was not checked is replaced."""

    def commit(self) -> None:
        """Flush everything to the disk and give it its names."""
        for path, target in zip(self.paths, self.targets, strict=True):
            with machine_errors(target):
                self._flush(path)
        home = self.name.parent
        with machine_errors(self.name), beside.turn(self.name), held():
            try:
                self._replace(home)
            except BaseException:
                self._put_back(home)
                raise
            if not self.interim:
                completed.append(self.targets[0])
            with machine_errors(self.name, AFTER):
                _flush(home)
                beside.give_up(self.directory)
                self._close()

    def _replace(self, home: Path) -> None:
        """Let the outputs take their names, the first one last."""
        if self.overwrite:
            for target in self.targets:
                self._check(target)  # once more: what is there may have come since
            old = self.directory / beside.OLD
            old.mkdir()
            for target in self.targets:
                if os.path.lexists(target):
                    os.rename(target, old / target.name)
            _flush(home)
        for path, target in reversed(list(zip(self.paths, self.targets, strict=True))):
            if target == self.targets[0]:
                _flush(home)
            self._take_name(path, target)
            self._taken.append((path, target))

    def _put_back(self, home: Path) -> None:
        """After an error: the new outputs lose their names, the old ones get theirs."""
        hint = "run again: what writes this output next puts them back"
        try:
            for path, target in reversed(self._taken):
                os.replace(target, path)
            if beside.put_back(self.directory, home):
                return
            text = "something else has taken the name"
            hint = "move them away from there: what writes this output next removes them"
        except OSError as e:
            text = (e.strerror or str(e)).lower()
        self._open = False
        beside.finished(self.directory)
        raise MachineError(
            f"{text}, and the old files could not be put back",
            path=self.name,
            found=f"them in {self.directory / beside.OLD}",
            hint=hint,
        )

    def _close(self) -> None:
        if self._open:
            self._open = False
            beside.remove(self.directory)
            beside.finished(self.directory)
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._close()


class AtomicSet(_Together):
    """Files that are right only together; used as `AtomicOutput` is, and written at `paths`."""

    def __init__(
        self,
        name: Path,
        targets: Sequence[Path],
        *,
        overwrite: bool,
        inputs: Sequence[Path] = (),
        interim: bool = False,
    ) -> None:
        super().__init__(name, targets, overwrite=overwrite, inputs=inputs)
        self.interim = interim

    def _check(self, target: Path) -> None:
        check_target(target, self.overwrite, self._inputs)

    def _flush(self, path: Path) -> None:
        _flush(path)

    def _take_name(self, path: Path, target: Path) -> None:
        _take_name(path, target, self.overwrite)


class AtomicDirectory(_Together):
    """A directory of files under construction beside its target; used as `AtomicOutput` is.

    Whoever writes it makes files, and directories, in `path`. At every moment the target is the
    old directory, nothing, or the new one with all its files.

    Args:
        target: the final name.
        overwrite: whether an existing directory may be replaced, if `check_directory` allows it.
        inputs: files, or model directories, that must not lie in what is replaced.

    Raises:
        OutputExistsError, MachineError: as of `check_directory`, or its directory refuses.
    """

    def __init__(self, target: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
        super().__init__(target, [target], overwrite=overwrite, inputs=inputs)
        self.target = target
        self.path = self.paths[0]
        try:
            with machine_errors(target):
                self.path.mkdir()
        except BaseException:
            self._close()
            raise

    def _check(self, target: Path) -> None:
        check_directory(target, self.overwrite, self._inputs)

    def _flush(self, path: Path) -> None:
        for entry in sorted(path.iterdir()):
            if entry.is_dir():
                self._flush(entry)
            else:
                _flush(entry)
        _flush(path)

    def _take_name(self, path: Path, target: Path) -> None:
        if os.path.lexists(target):  # an empty directory would be replaced
            raise _appeared(target)
        os.rename(path, target)


@contextmanager
def draft_directory(output: Path) -> Iterator[Path]:
    """A directory beside an output for a first version of it, gone after the block; what is
    completed in it is no output of the run.
    """
    place = output.with_name(f"{output.name}.draft")
    with machine_errors(output):
        _check_name(output)
        beside.remove_leftovers(place)
        directory, lock = beside.temporary_directory(place)
    try:
        yield directory
    finally:
        completed[:] = [path for path in completed if directory not in path.parents]
        beside.remove(directory)
        beside.finished(directory)
        os.close(lock)


def _check_name(target: Path) -> None:
    if target.name in ("", ".."):
        raise MachineError("the output has no file name", path=target)
    if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
        raise MachineError(
            "file name too long",
            path=target,
            found=f"{len(os.fsencode(target.name))} bytes",
            wanted=f"at most {MAX_NAME_BYTES}",
        )
    if not target.parent.is_dir():
        raise MachineError(
            "no such directory",
            path=target.parent,
            hint="create it first, or choose another",
        )


def check_target(target: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a target that exists, unless it may be replaced and is nothing that is read.

    Raises:
        MachineError: it is an input, or no regular file.
        OutputExistsError: it may not be replaced.
    """
    if not os.path.lexists(target):
        return
    if target.exists():
        for source in (f for path in inputs for f in input_files(path)):
            if source.exists() and target.samefile(source):
                raise MachineError(
                    "the output is the input",
                    path=target,
                    hint="choose another name",
                )
        if not stat.S_ISREG(target.stat().st_mode):
            raise MachineError("the output is not a regular file", path=target)
    if not overwrite:
        raise OutputExistsError("the output exists", path=target, hint="replace it with --force")


def check_directory(target: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a directory that exists, unless it may be replaced: it is an output, or empty, and
    nothing of it is in use here.

    Raises:
        MachineError: it is a link or no directory, holds an input or the current directory, or
            holds what no output has.
        OutputExistsError: it may not be replaced.
    """
    if not os.path.lexists(target):
        return
    other = "choose another name"
    if target.is_symlink():
        raise MachineError("the output is a link", path=target, hint="name what it leads to")
    if not target.is_dir():
        raise MachineError("the output is not a directory", path=target, hint=other)
    for source in (f for path in inputs for f in (path, *input_files(path))):
        if lies_in(source, target):
            raise MachineError(
                "the output directory holds an input", path=target, found=source, hint=other
            )
    with suppress(FileNotFoundError):  # the current directory may be gone
        if lies_in(Path.cwd(), target):
            raise MachineError(
                "the output directory holds the current directory", path=target, hint=other
            )
    foreign = foreign_entry(target)
    if foreign:
        raise MachineError(
            "the directory does not look like an output, and is not replaced",
            path=target,
            found=foreign,
            wanted="a config.json, safetensors files and others of a model, or nothing",
            hint=f"{other}, or remove it yourself",
        )
    if not overwrite:
        raise OutputExistsError("the output exists", path=target, hint="replace it with --force")


def _take_name(path: Path, target: Path, overwrite: bool) -> None:
    """Give the file its name; not that of another, unless it may be replaced."""
    if overwrite:
        os.replace(path, target)
        return
    try:
        os.link(path, target)
    except FileExistsError:
        raise _appeared(target) from None
    except OSError as e:
        if e.errno not in NO_LINKS or os.path.lexists(target):
            raise
        os.replace(path, target)
    else:
        beside.remove(path)


def _appeared(target: Path) -> OutputExistsError:
    return OutputExistsError(
        "the output appeared while it was being written",
        path=target,
        hint="replace it with --force",
    )


def _flush(path: Path) -> None:
    """Have the disk hold what a file or directory holds."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_space(target: Path, wanted: int) -> None:
    """Refuse early when the disk has fewer than ``wanted`` bytes free."""
    with machine_errors(target):
        fs = os.statvfs(target.parent)
    free = fs.f_bavail * fs.f_frsize
    if free < wanted:
        raise MachineError(
            "not enough space on the disk",
            path=target,
            found=f"{free:,} bytes free",
            wanted=f"{wanted:,}",
            hint=HINTS[errno.ENOSPC],
        )
