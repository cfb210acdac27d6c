"""One process at a time on a run: two would overwrite each other's checkpoint and record."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: runs there are not locked
    fcntl = None  # type: ignore[assignment]


class Busy(RuntimeError):
    """Another process, or another thread of this one, trains the run."""


@contextlib.contextmanager
def locked(checkpoint: Path) -> Iterator[None]:
    """Hold the run of a checkpoint's path, which need not exist.

    The lock is the system's, on ``.<checkpoint>.lock`` beside the checkpoint, and ends with the
    process, however it ends: a file that a killed run leaves locks nothing.

    Raises:
        Busy: the run is held elsewhere.
    """
    if fcntl is None:
        yield
        return
    path = checkpoint.with_name(f".{checkpoint.name}.lock")
    descriptor = _acquire(path, checkpoint.stem)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # its folder may be gone
            path.unlink()  # while it is held: nobody else's file goes
        os.close(descriptor)


def _acquire(path: Path, name: str) -> int:
    """A descriptor that holds the lock until it is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # no child program inherits it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Busy(
                f"{name} is being trained by another process ({path}): wait for it, or use a group"
            ) from None
        except OSError:  # some network file systems have no locks: go on without
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its holder has just ended and removed it: another file counts
