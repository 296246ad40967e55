"""A regular file, opened and read without trusting it to be there, to be a file, or to stay as it
is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from qconvert.errors import FormatError, InputError, MachineError, QconvertError

# Large reads follow each other: what comes next is asked for while they are worked on. From a disk
# a conversion to q4_0 took 1.4 to 1.7 s where it took 1.8 to 1.9; 4 MiB ahead gain half of that.
LARGE_READ = 1 << 19
READ_AHEAD = 1 << 23
HASHED_BYTES = 1 << 20  # at a time
_FILE_TYPES = {
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


class RegularFile:
    """A regular file, open for reading at any offset by several threads at once.

    Read with ``pread`` rather than mapped: a file that is truncated under us is then an error, not
    a SIGBUS.

    Attributes:
        path: as given.
        size: bytes, when it was opened.

    Raises:
        InputError: there is no such file, it may not be read, or it is not a regular file.
        MachineError: the operating system cannot open it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        try:
            # A FIFO would block the open itself without O_NONBLOCK.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            status = os.fstat(self._fd)
        except OSError as error:
            raise os_refusal(path, error) from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise _not_regular(path, _FILE_TYPES.get(stat.S_IFMT(status.st_mode)))
        self.size = status.st_size
        self._mtime_ns = status.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """Bytes ``offset..offset+size``, which the caller knows to lie within the file.

        Raises:
            FormatError: the file has become shorter.
            MachineError: the operating system cannot read it.
        """
        if self._fd < 0:
            raise ValueError("read from a closed file")
        try:
            data = os.pread(self._fd, size, offset)
            while len(data) < size:  # Linux reads at most 2 GiB at once
                more = os.pread(self._fd, size - len(data), offset + len(data))
                if not more:
                    raise FormatError(
                        "file changed while it was read",
                        path=self.path,
                        found=f"its end at byte {offset + len(data)}",
                        wanted=f"{self.size} bytes, its size when it was opened",
                        hint="wait until the file is complete, then run again",
                        code="FILE-CHANGED",
                    )
                data += more
            if size >= LARGE_READ and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset + size, READ_AHEAD, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise os_refusal(self.path, error) from error
        return data

    def sha256(self, size: int | None = None) -> str:
        """Of all bytes, or of the first ``size``, in hex; raises as `read` does."""
        end = self.size if size is None else size
        digest = hashlib.sha256()
        for start in range(0, end, HASHED_BYTES):
            digest.update(self.read(start, min(HASHED_BYTES, end - start)))
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened.

        Raises:
            InputError: its size or its time of modification differs.
        """
        if self._fd < 0:
            raise ValueError("check of a closed file")
        try:
            status = os.fstat(self._fd)
        except OSError as error:
            raise os_refusal(self.path, error) from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self._mtime_ns):
            raise InputError(
                "file changed while it was read",
                path=self.path,
                found=f"{status.st_size} bytes, modified at {status.st_mtime_ns} ns",
                wanted=f"{self.size} bytes, modified at {self._mtime_ns} ns, as when it was opened",
                hint="wait until the file is complete, then run again",
                code="FILE-CHANGED",
            )

    def close(self) -> None:
        """Close it; may be called again. Nothing was written, so that it cannot fail."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        self.close()


def file_sha256(path: Path) -> str:
    """Of a whole file, in hex; raises as `RegularFile` does."""
    file = RegularFile(path)
    try:
        return file.sha256()
    finally:
        file.close()


def utf8_name(path: Path) -> str:
    """The name of a file as text that can be stored; a name need not be UTF-8."""
    return os.fsencode(path.name).decode("utf-8", "backslashreplace")


def os_refusal(path: Path, error: OSError) -> QconvertError:
    """What the operating system's refusal to open or read ``path`` means."""
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return InputError("no such file or directory", path=path, code="FILE-MISSING")
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputError(
            reason, path=path, hint="check who may read the file", code="FILE-PERMISSION"
        )
    if error.errno == errno.ENXIO:
        return _not_regular(path, _FILE_TYPES[stat.S_IFSOCK])
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return InputError(reason, path=path, code="FILE-PATH")
    hint = "raise the limit: ulimit -n 4096" if error.errno == errno.EMFILE else None
    return MachineError(reason, path=path, hint=hint, code="FILE-IO")


def _not_regular(path: Path, found: str | None) -> InputError:
    return InputError(
        "not a regular file",
        path=path,
        found=found,
        hint="weights are read in any order: save them to a file first",
        code="FILE-NOT-REGULAR",
    )
