"""What is wrong with a document that was read, in one line that names each key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError


@contextmanager
def named_faults(source: str, error: type[ValueError]) -> Iterator[None]:
    """Raise pydantic's errors as ``error``, whose message names ``source`` and each key at fault.

    Parameters
    ----------
    source : str
        What is read, as it is called in messages.
    error : type
    """
    try:
        yield
    except ValidationError as faults:
        raise error(f"{source}: {faults_by_key(faults)}") from faults


def faults_by_key(error: ValidationError) -> str:
    """Say what is wrong with each key, in one line."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"] if part != "[key]")
        unknown = fault["type"] == "extra_forbidden"
        message = "unknown key" if unknown else fault["msg"].removeprefix("Value error, ")
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines)
