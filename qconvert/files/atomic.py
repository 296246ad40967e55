"""Writing files so that their names are old, absent or complete, whatever happens."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from qconvert.errors import MachineError, OutputExistsError
from qconvert.files import beside
from qconvert.files.beside import remove_partial_files
from qconvert.interrupts import held

__all__ = [
    "AtomicOutput",
    "AtomicSet",
    "check_space",
    "completed",
    "machine_errors",
    "remove_partial_files",
]

HINTS = {
    errno.ENOSPC: "free some space, or write to another disk with -o",
    errno.EDQUOT: "the disk quota is used up; write to another disk with -o",
    errno.EFBIG: "the file size limit (ulimit -f) or the file system does not allow it",
    errno.EACCES: "choose a directory you may write to with -o",
    errno.EROFS: "choose a directory you may write to with -o",
    errno.ENOENT: "create the directory first",
    errno.EMFILE: "raise the limit: ulimit -n 4096",
}

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
MAX_NAME_BYTES = 255  # of the file systems that matter
# What a model directory is read for; results of ours may lie there too and may be replaced.
INPUT_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})
MODULE_DEPTH = 2  # directories below a model's in which its files lie: 1_Pooling, 0_Transformer/x
_OF_SEVERAL = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")

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


class AtomicSet:
    """Files that are right only together, under construction in a directory beside them.

    Used as `AtomicOutput` is; the files are written at `paths`. ``commit`` flushes all of them
    before the first gets its name. The first, without which nobody takes the others for a set, is
    the first to lose and the last to get its name: whatever ends the run between the two, the set
    is absent, and the next run to it puts the old files back. An error puts them back at once.

    Args:
        name: of the set: what it would be called if it were one file.
        targets: the final names, in one directory.
        overwrite, inputs: as of `AtomicOutput`.
    """

    def __init__(
        self,
        name: Path,
        targets: Sequence[Path],
        *,
        overwrite: bool,
        inputs: Sequence[Path] = (),
    ) -> None:
        self.name = name
        self.targets = tuple(targets)
        self.overwrite = overwrite
        with machine_errors(name):
            for target in targets:
                _check_name(target)
            beside.remove_leftovers(name)
            for target in targets:
                check_target(target, overwrite, inputs)
            self.directory, self._lock = beside.temporary_directory(name)
        self.paths = tuple(self.directory / target.name for target in targets)
        self._taken: list[Path] = []
        self._open = True

    def commit(self) -> None:
        """Flush all files to the disk and give them their names."""
        for path, target in zip(self.paths, self.targets, strict=True):
            with machine_errors(target):
                _flush(path)
        home = self.name.parent
        with machine_errors(self.name), beside.turn(self.name), held():
            try:
                self._replace(home)
            except BaseException:
                self._put_back(home)
                raise
            completed.append(self.targets[0])
            with machine_errors(self.name, AFTER):
                _flush(home)
                self._close()

    def _replace(self, home: Path) -> None:
        """Let the files take their names, the first one last."""
        if self.overwrite:
            old = self.directory / beside.OLD
            old.mkdir()
            for target in self.targets:
                if os.path.lexists(target):
                    os.rename(target, old / target.name)
            _flush(home)
        for path, target in reversed(list(zip(self.paths, self.targets, strict=True))):
            if target == self.targets[0]:
                _flush(home)
            _take_name(path, target, self.overwrite)
            self._taken.append(target)

    def _put_back(self, home: Path) -> None:
        """After an error: the new files lose their names, the old ones get theirs."""
        try:
            for target in reversed(self._taken):
                target.unlink()
            beside.put_back(self.directory, home)
        except OSError as e:
            self._open = False
            beside.finished(self.directory)
            raise MachineError(
                f"{(e.strerror or str(e)).lower()}, and the old files could not be put back",
                path=self.name,
                found=f"them in {self.directory / beside.OLD}",
                hint="run again: what writes this output next puts them back",
            ) from e

    def _close(self) -> None:
        if self._open:
            self._open = False
            beside.remove(self.directory)
            beside.finished(self.directory)
            os.close(self._lock)

    def __enter__(self) -> AtomicSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._close()


def _check_name(target: Path) -> None:
    if not target.name:
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
            hint="create it first, or choose another with -o",
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
        for source in (f for path in inputs for f in _input_files(path)):
            if source.exists() and target.samefile(source):
                raise MachineError(
                    "the output is the input",
                    path=target,
                    hint="choose another name with -o",
                )
        if not stat.S_ISREG(target.stat().st_mode):
            raise MachineError("the output is not a regular file", path=target)
    if not overwrite:
        raise OutputExistsError("the output exists", path=target, hint="replace it with --force")


def _input_files(path: Path) -> Iterator[Path]:
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


def _take_name(path: Path, target: Path, overwrite: bool) -> None:
    """Give the file its name; not that of another, unless it may be replaced."""
    if overwrite:
        os.replace(path, target)
        return
    try:
        os.link(path, target)
    except FileExistsError:
        raise OutputExistsError(
            "the output appeared while it was being written",
            path=target,
            hint="replace it with --force",
        ) from None
    except OSError as e:
        if e.errno not in NO_LINKS or os.path.lexists(target):
            raise
        os.replace(path, target)
    else:
        beside.remove(path)


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
