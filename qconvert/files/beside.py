"""Temporary files and directories beside what they are to become.

Each has a random name and is locked (``flock``) by the run that writes it, for as long as that run
lives. What a killed run has left is therefore known by its lock, which is free, and not by a
process number, which two containers share; the next run to the same target removes it. Where a
file system has no locks nothing is removed but what the run itself has made.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qconvert.errors import MachineError

LOCK = ".lock"  # in a temporary directory
OLD = "old"  # in that of a set: the files that the set replaces
REPLACED = "replaced"  # the same, once they are not to be put back any more
MOST_PREFIX = 200  # bytes of the target's name in a temporary one, of the 255 that a name may have
_TOKEN = re.compile(r"[0-9a-f]{1,16}")  # 16 digits; before there were locks, the process number
_TURN = "0"
_PARTIAL = ".partial-"  # in the name of what is temporary
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Key = tuple[str, str]  # the real directory of a target, and its name

# What this process has not finished: temporary paths, and what each is to become.
_under_construction: dict[Path, Key] = {}


def remove_partial_files() -> None:
    """Remove what an interrupt left between the making of a file and the ``with`` block that owns
    it.
    """
    while _under_construction:
        path, _ = _under_construction.popitem()
        remove(path)


def temporary_file(target: Path) -> tuple[Path, int]:
    """A new and locked file in the directory of ``target``: its path and descriptor.

    Raises:
        MachineError: this process writes that target already.
        OSError: the directory refuses.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    while True:
        with _made(target) as path:
            fd = os.open(path, flags, 0o666)
            with _closed_on_error(fd):
                if _locked(fd) is not False and os.fstat(fd).st_nlink:
                    return path, fd
            os.close(fd)  # another run took it for a leftover before it was locked
        finished(path)


def temporary_directory(target: Path) -> tuple[Path, int]:
    """A new directory beside ``target`` with a locked file in it: its path, and that file's
    descriptor. Raises as `temporary_file` does.
    """
    while True:
        with _made(target) as path:
            path.mkdir(0o700)
            with suppress(FileNotFoundError):
                fd, lock = _lock_inside(path)
                if lock is not False:
                    return path, fd
                os.close(fd)
        finished(path)


def is_temporary(name: str) -> bool:
    """Whether a file, or directory, of this name is one under construction."""
    return name.startswith(".") and _PARTIAL in name


def finished(path: Path) -> None:
    """The temporary ``path`` has become what it was to be, or is gone."""
    _under_construction.pop(path, None)


def remove(path: Path) -> None:
    """Remove a temporary file or directory as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_leftovers(target: Path) -> None:
    """Remove what killed runs have left beside ``target``, and put back what one of them had
    moved away; errors are passed over, for nothing depends on it.
    """
    prefix = _prefix(target)
    with suppress(OSError):
        found = [
            entry.name
            for entry in os.scandir(target.parent)
            if entry.name.startswith(prefix) and _TOKEN.fullmatch(entry.name[len(prefix) :])
        ]
        for name in found:
            with suppress(OSError):
                _remove_leftover(target.parent / name, target)


def _remove_leftover(path: Path, target: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        fd, lock = _lock_inside(path)
        try:
            if lock:
                with turn(target):
                    if not put_back(path, path.parent):  # an error leaves them to the next run
                        give_up(path)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)
    elif stat.S_ISREG(mode):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if _locked(fd):
                path.unlink()
        finally:
            os.close(fd)


def put_back(directory: Path, home: Path) -> bool:
    """Undo a replacement that was torn: old files in ``directory`` take their names again.

    The first file of a set is moved away first and named last, so that as long as it has no name
    the replacement is not complete. It is put back last, for the same reason. What is replaced may
    be a directory as well: a set of one.

    Returns:
        Whether no old file is left there: False where the first has its name again already.

    Raises:
        OSError: a file cannot be moved; the first then has no name.
    """
    old = directory / OLD
    names = sorted(os.listdir(old)) if old.is_dir() else []
    if names and os.path.lexists(home / names[0]):
        return False
    for name in reversed(names):
        os.replace(old / name, home / name)
    return True


def give_up(directory: Path) -> None:
    """Old files in ``directory`` have been replaced: whoever finds some of them, because their
    removal was cut short, must not put them back.
    """
    with suppress(OSError):
        os.rename(directory / OLD, directory / REPLACED)


@contextmanager
def turn(target: Path) -> Iterator[None]:
    """Wait until no other run gives names to files of ``target``, and have them wait meanwhile."""
    path = target.parent / (_prefix(target) + _TURN)
    fd = _waited_for(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(fd)


def _waited_for(path: Path) -> int:
    """The descriptor of a file that is there only while somebody has its lock, now ours."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with _closed_on_error(fd):
            with suppress(OSError):  # where there are no locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_at(fd, path):
                return fd
        os.close(fd)  # the one before us has removed it


def _prefix(target: Path) -> str:
    return os.fsdecode(b"." + os.fsencode(target.name)[:MOST_PREFIX]) + _PARTIAL


def _register(target: Path) -> Path:
    """The path of a temporary file or directory that is about to be made."""
    key = (os.path.realpath(target.parent), target.name)
    if key in _under_construction.values():
        raise MachineError("two outputs have this name", path=target)
    path = target.parent / (_prefix(target) + secrets.token_hex(8))
    _under_construction[path] = key
    return path


@contextmanager
def _made(target: Path) -> Iterator[Path]:
    """The path of a temporary file or directory to be made in the block, gone on an error."""
    path = _register(target)
    try:
        yield path
    except BaseException:
        remove(path)
        finished(path)
        raise


@contextmanager
def _closed_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def _lock_inside(directory: Path) -> tuple[int, bool | None]:
    """The descriptor of the file in a temporary directory that is locked, and whether the lock is
    now ours, as of `_locked`.

    Raises:
        FileNotFoundError: another run has removed the directory.
    """
    path = directory / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with _closed_on_error(fd):
        lock = _locked(fd)
        return fd, lock if _is_at(fd, path) else False


def _locked(fd: int) -> bool | None:
    """Whether the lock was free and is now ours; None where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    found = os.fstat(fd)
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (found.st_dev, found.st_ino)
