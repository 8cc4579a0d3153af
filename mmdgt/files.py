"""Files that are there whole or not at all; the standard library alone."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = '.part-'  # how the names of incomplete files start; a killed process leaves them


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a file to write, which takes its name only when it is complete.

    It lies in the same folder and ends alike, for writers that tell the format from
    the name. On the disk before it is renamed, it replaces what was there in one step;
    if writing fails, what was there stays.

    Args:
        path (str | Path): Its name; the folder is made where it is missing.

    Raises:
        OSError: If it can't be written, or the name is that of a folder or device.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise OSError(f'expected a file to write, but {path} is a folder or a device')
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{PART}{secrets.token_hex(4)}-{path.name}')
    try:
        yield part
        _flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as part:
        part.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, data: Any, indent: int = 1) -> None:
    """Write data as JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=indent) + '\n')
