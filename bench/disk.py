"""A disk that is full, gone or not to be written: no trial's fault. The run ends, and goes on when that is mended."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.config import UserError

_FREE = "free space there"
_BACK = "put it back, or mount it again"
_PERMIT = "make it writable"

#: What mends each of these; ``errno``'s codes.
_REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: f"{_FREE}, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: _PERMIT,
    errno.EACCES: _PERMIT,
    errno.EPERM: _PERMIT,
    errno.ENOENT: _BACK,
    errno.ENOTDIR: _BACK,
    errno.ESTALE: _BACK,
    errno.ENOTCONN: _BACK,
    errno.ENODEV: _BACK,
    errno.EIO: "see to the disk",
}

#: Those that say no more than that the disk is at fault, whatever was read or written when they came.
_ANYWHERE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.ESTALE, errno.ENOTCONN, errno.ENODEV),
}


class DiskError(UserError):
    """The place where results are kept cannot be used now; what was not written to its end did not happen."""


def disk_error(path: Path | str, error: OSError, *, doing: str = "write") -> DiskError:
    """The one line for the user: where, what, and that the same command goes on when it is mended."""
    remedy = _REMEDIES.get(error.errno or 0, "mend that")
    return DiskError(f"cannot {doing} {path}: {_reason(error)}; {remedy}, and the same command goes on.")


def find_disk_error(error: BaseException) -> DiskError | None:
    """The fault of a disk behind this exception, if there is one: some libraries wrap an OSError in another."""
    for each in _chain(error):
        if isinstance(each, DiskError):
            return each
        if isinstance(each, OSError) and each.errno in _ANYWHERE:
            return disk_error(each.filename or "a file", each, doing="use")
    return None


@contextmanager
def on_disk(path: Path, doing: str = "write") -> Iterator[None]:
    """Within, an OSError, also one that a library has made another error of, is the `DiskError` of this path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = next((each for each in _chain(error) if isinstance(each, OSError)), None)
        if cause is None:
            raise
        raise disk_error(path, cause, doing=doing) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, and what it came from: as a traceback shows it."""
    following: BaseException | None = error
    while following is not None:
        yield following
        hidden = following.__suppress_context__
        following = following.__cause__ or (None if hidden else following.__context__)


def _reason(error: OSError) -> str:
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
