"""A turn as bytes, with a checksum over its names and its content.

8 bytes of BLAKE2b, then JSON. A turn of six states takes about 360 bytes, and some 18 more for each
further state; the hashes of parent and bundle are 64 each.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import ValidationError

from midstream.ledger.ledger import TurnRecord

_CHECKSUM = 8  # bytes: a flipped bit goes unseen once in 2^64


class CorruptedTurn(ValueError):
    """Stored bytes that are no turn, or another one than their place says."""


def encode(record: TurnRecord) -> bytes:
    """Return what a store keeps beside the names of conversation and turn."""
    content = record.model_dump_json(exclude={"conversation", "key"}).encode()
    return _checksum(record.conversation, record.key, content) + content


def verify(conversation: str, key: str, value: object) -> bytes:
    """Return the content, once its checksum has been found to hold for this place.

    Raises
    ------
    CorruptedTurn
        If it does not.
    """
    if not isinstance(value, bytes) or len(value) < _CHECKSUM:
        raise CorruptedTurn(f"turn {key!r} of conversation {conversation!r} is cut short")
    content = value[_CHECKSUM:]
    if value[:_CHECKSUM] != _checksum(conversation, key, content):
        raise CorruptedTurn(f"turn {key!r} of conversation {conversation!r} fails its checksum")
    return content


def decode(conversation: str, key: str, value: object) -> TurnRecord:
    """Return the turn that was stored here.

    Raises
    ------
    CorruptedTurn
        If the bytes do not hold it.
    """
    content = verify(conversation, key, value)
    try:
        return TurnRecord(conversation=conversation, key=key, **json.loads(content))
    except (ValidationError, ValueError, TypeError) as error:
        # The checksum holds, so somebody else writes here, or another version does.
        raise CorruptedTurn(
            f"turn {key!r} of conversation {conversation!r} is of another format: {error}"
        ) from error


def _checksum(conversation: str, key: str, content: bytes) -> bytes:
    names = f"{len(conversation)},{conversation},{key},".encode()
    return hashlib.blake2b(names + content, digest_size=_CHECKSUM).digest()
