"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write a new folder of files, which appears under its name in one rename, on the disk.

    A process killed before the rename leaves at most a sibling ``.NAME.partial-*``, which can be
    removed; any other failure leaves nothing. Files are written in the order given.

    Parameters
    ----------
    path
        The new folder; its parents are made where they are missing.
    files
        Content of each file by name.

    Raises
    ------
    FileExistsError
        If there is anything at ``path``, were it an empty folder.
    OSError
        If the disk refuses.
    """
    target = Path(os.path.abspath(path))
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        for name, content in files.items():
            with open(partial / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(partial)
        try:
            os.rename(partial, target)
        except OSError:
            _refuse_existing(target)  # somebody was faster
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(target.parent)


def replace_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file, which appears under its name in one rename, on the disk; replaces an older one.

    A process killed before the rename leaves at most ``NAME.partial``, which the next call writes
    over; any other failure leaves nothing. No two processes may write one file at a time.

    Parameters
    ----------
    path
    parts
        Its content, one part after the other.

    Raises
    ------
    OSError
        If the disk refuses.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def sync_folder(folder: Path) -> None:
    """Have the disk take the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
