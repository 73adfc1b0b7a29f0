"""A file that appears whole or not at all.

Invariant: whatever happens inside `written_beside`, the file at the target is the previous one
until every byte of the new one is on the disk; and no partial file stays behind, short of a power
cut.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flame.core.errors import CheckpointError, FlameError


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[BinaryIO]:
    """A new file in ``target``'s folder that takes its name at the end of the block.

    Raises CheckpointError, with the path and what to do, where the file cannot be written.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _flush_folder(target.parent)
    except FlameError:
        raise
    except OSError as error:
        kept = "; the file that was there is untouched" if target.is_file() else ""
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}{kept}. "
            "Free space or choose another folder, then try again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
