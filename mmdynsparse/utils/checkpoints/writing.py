"""Writing checkpoints so that nothing written before is lost."""

import contextlib
import os
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from .files import check_checkpoint

PARTIAL = '.partial'  # ends the names of unfinished files; a killed process leaves them behind
WHOLE_FILES = 'mmdynsparse.whole_files'  # name of the backend below


@register_backend(WHOLE_FILES)
class WholeFileBackend(LocalBackend):
    """Local files that are replaced at once, or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file beside the one that it replaces, and rename it when it is on the disk.

        Args:
            obj: Content.
            filepath: Path of the file.

        Raises:
            OSError: If it cannot be written, for example on a full disk. What was there before is
                still there.
        """
        path = Path(filepath)
        partial = path.with_name(path.name + PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open('wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            reason = f'{error.strerror}, to write {len(obj) / 1e6:.1f} MB; no file was changed'
            raise OSError(error.errno, reason, str(path)) from error


def newest_checkpoint(folder: str | Path) -> str | None:
    """Return the newest checkpoint of a folder from which training can be resumed.

    Args:
        folder: Work dir of a training. Files that are truncated or hold weights only are passed
            over.

    Returns:
        Its path, or None if there is none.
    """
    files = [path for path in Path(folder).glob('*.pth') if not path.name.startswith('best_')]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError):
            check_checkpoint('checkpoint', str(path), resume=True)
            return str(path)
    return None
