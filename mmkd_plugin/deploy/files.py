"""Writing files completely or not at all."""
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EISDIR}


def refuse_existing(option: str, path: str | Path, overwrite: bool) -> None:
    """Raises ``ValueError`` if ``path`` exists and may not be replaced."""
    if Path(path).exists() and not overwrite:
        raise ValueError(f'{option}: {str(path)!r} exists. Choose another name, or replace it with --overwrite')


@contextmanager
def finished(option: str, path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Context that yields the path of an unfinished file and renames it to ``path`` if the block succeeds.

    Args:
        option: the option that error messages name, such as ``'--onnx'``.
        path: path of the finished file. Its folder is created.
        overwrite: whether the file may exist.

    Raises:
        ValueError: the file exists, or cannot be written. The unfinished file is then deleted.
    """
    refuse_existing(option, path, overwrite)
    path = Path(path)
    unfinished = path.with_name(f'{path.name}.unfinished')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open('rb+') as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        ours = {os.path.abspath(each) for each in (path, unfinished, *path.parents)}
        is_ours = not isinstance(error.filename, str) or os.path.abspath(error.filename) in ours
        if error.errno not in _DISK or not is_ours:
            raise
        raise ValueError(f'{option}: cannot write {str(path)!r}: {error.strerror}. No file was written') from error
    finally:
        unfinished.unlink(missing_ok=True)
