"""Writing a file so that its name is old, absent or complete, whatever happens."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from qconvert.errors import MachineError, OutputExistsError

HINTS = {
    errno.ENOSPC: "free some space, or write to another disk with -o",
    errno.EDQUOT: "the disk quota is used up; write to another disk with -o",
    errno.EFBIG: "the file size limit (ulimit -f) or the file system does not allow it",
    errno.EACCES: "choose a directory you may write to with -o",
    errno.EROFS: "choose a directory you may write to with -o",
    errno.ENOENT: "create the directory first",
}

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
MAX_NAME_BYTES = 255  # of the file systems that matter
# What a model directory is read for; results of ours may lie there too and may be replaced.
INPUT_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"})

_under_construction: set[Path] = set()


def remove_partial_files() -> None:
    """Remove what an interrupt left between the making of a file and the ``with`` block that owns
    it.
    """
    while _under_construction:
        with suppress(OSError):
            _under_construction.pop().unlink()


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into the MachineError that names the file."""
    try:
        yield
    except OSError as e:
        text = (e.strerror or str(e)).lower()
        raise MachineError(text, path=path, hint=HINTS.get(e.errno or 0)) from e


class AtomicOutput:
    """A file under construction beside its target.

    Opened before any long work, so that an unwritable directory costs no time. ``commit`` makes it
    durable and moves it to its name; leaving the ``with`` block without it removes it.

    Args:
        target: the final name.
        overwrite: whether an existing target may be replaced.
        inputs: files, or model directories, that must not be written over, by any spelling or link.

    Raises:
        OutputExistsError: the target exists and ``overwrite`` is False.
        MachineError: the target is an input or not a regular file, or the directory refuses.
    """

    def __init__(self, target: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
        self.target = target
        self.overwrite = overwrite
        with machine_errors(target):
            self._check(inputs)
            self.path, self.fd = _create_beside(target)
        self._open = True

    def _check(self, inputs: Sequence[Path]) -> None:
        if not self.target.name:
            raise MachineError("the output has no file name", path=self.target)
        if len(os.fsencode(self.target.name)) > MAX_NAME_BYTES:
            raise MachineError(
                "file name too long",
                path=self.target,
                found=f"{len(os.fsencode(self.target.name))} bytes",
                wanted=f"at most {MAX_NAME_BYTES}",
            )
        if not self.target.parent.is_dir():
            raise MachineError(
                "no such directory",
                path=self.target.parent,
                hint="create it first, or choose another with -o",
            )
        if not os.path.lexists(self.target):
            return
        for source in (f for path in inputs for f in _input_files(path)):
            if source.exists() and self.target.exists() and self.target.samefile(source):
                raise MachineError(
                    "the output is the input",
                    path=self.target,
                    hint="choose another name with -o",
                )
        if self.target.exists() and not stat.S_ISREG(self.target.stat().st_mode):
            raise MachineError("the output is not a regular file", path=self.target)
        if not self.overwrite:
            raise OutputExistsError(
                "the output exists", path=self.target, hint="replace it with --force"
            )

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
            if self.overwrite:
                os.replace(self.path, self.target)
            else:
                self._link()
            directory = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        self._close()

    def _link(self) -> None:
        """Take the name only if nobody has taken it meanwhile, where the file system has links."""
        try:
            os.link(self.path, self.target)
        except FileExistsError:
            raise OutputExistsError(
                "the output appeared while it was being written",
                path=self.target,
                hint="replace it with --force",
            ) from None
        except OSError as e:
            if e.errno not in NO_LINKS or os.path.lexists(self.target):
                raise
            os.replace(self.path, self.target)
        else:
            self.path.unlink()

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self.fd)
            _under_construction.discard(self.path)

    def __enter__(self) -> AtomicOutput:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._open:
            self.path.unlink(missing_ok=True)
            self._close()


def _input_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [f for f in path.iterdir() if f.suffix in INPUT_SUFFIXES]


def _create_beside(target: Path) -> tuple[Path, int]:
    """A new file of our own in the directory of ``target``: its path and descriptor."""
    name = b"." + os.fsencode(target.name)[:200] + b".partial-%d" % os.getpid()
    path = target.parent / os.fsdecode(name)
    if path in _under_construction:
        raise MachineError("two outputs have this name", path=target)
    _under_construction.add(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        try:
            return path, os.open(path, flags, 0o666)
        except FileExistsError:
            # Left by a killed run with this process number: containers give every run the same.
            path.unlink()
            return path, os.open(path, flags, 0o666)
    except OSError:
        _under_construction.discard(path)
        raise


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
