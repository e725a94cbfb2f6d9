"""Hosts, recipients and paths in a call, however they are written."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from urllib.parse import unquote

_AUTHORITY = re.compile(r"[a-z0-9.\-]{1,253}(?::[0-9]{1,5})?")
_RECIPIENT = re.compile(r"[^@\s%]+@[^@\s/%]+|[^@]+")
_BETWEEN = re.compile(r"[\s\"'`,;()\[\]{}<>|&=@]+")
_PATH = re.compile(r"[/~]|\.\.?[/\\]|\\\\|[A-Za-z]:[/\\]|\$\w+[/\\]|%\w+%[/\\]")
_UP = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)")
_PREFIX = re.compile(r"-[A-Za-z](?=[/~])|[^/]*:(?=[/~])")  # -I/usr, host:/usr
_ELSEWHERE = re.compile(r"\\\\|[A-Za-z]:|[$%]\w")  # a server, a drive, a variable


def addresses(distinct: Iterable[str]) -> tuple[list[str], list[str]]:
    """Hosts of URLs and e-mail addresses among words, each sorted."""
    hosts, recipients = set(), set()
    for word in [word for word in distinct if "@" in word or "://" in word]:
        if "://" in word:
            hosts.add(host_of(word))
        elif "@" in word[1:-1]:
            recipients.add(word.removeprefix("mailto:"))
    return sorted(hosts), sorted(recipients)


def host_of(url: str) -> str:
    """Host of a URL or of ``host[:port][/path]``; the whole authority where it is not plain.

    Parsers disagree about what an odd authority means, so none is guessed: `is_listed_host` takes
    none as it stands.
    """
    rest = url.partition("://")[2] or url
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if not _AUTHORITY.fullmatch(authority):
        return authority
    return authority.partition(":")[0].removesuffix(".")


def is_listed_host(host: str, patterns: Sequence[str]) -> bool:
    """Whether a host fits a pattern with ``*``; an odd one (``a.io;.b.io``) fits none."""
    return bool(_AUTHORITY.fullmatch(host)) and _fits(host, patterns)


def is_listed_recipient(recipient: str, patterns: Sequence[str]) -> bool:
    """Whether a recipient fits a pattern with ``*``; an odd one, such as two in one, fits none."""
    return bool(_RECIPIENT.fullmatch(recipient)) and _fits(recipient, patterns)


def _fits(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def paths_in(leaves: Iterable[str]) -> Iterator[str]:
    """Yield what looks like a path: whole values, and pieces (``--file=/a``, ``<../b``)."""
    for leaf in leaves:
        if _PATH.match(leaf):  # as a whole: it may hold spaces
            yield leaf
        for piece in _BETWEEN.split(unquote(leaf)):
            if piece[:5].lower() == "file:":
                yield "/" + piece[5:].lstrip("/\\")
            elif "://" not in piece:
                path = piece if _PATH.match(piece) else _PREFIX.sub("", piece, count=1)
                if _PATH.match(path) or _UP.search(path):
                    yield path


def is_inside(path: str, folders: Sequence[str]) -> bool:
    """Whether a path stays in a folder, however it is written.

    A relative one is taken from where the agent works, and only must not climb. Links on the disk
    are not followed: that is for whoever opens the file.
    """
    written = unquote(path)
    if "\0" in written or _ELSEWHERE.match(written):
        return False
    slashed = written.replace("\\", "/")
    if slashed.startswith(("/", "~")):
        norm = posixpath.normpath("/" + slashed.lstrip("/") if slashed[0] == "/" else slashed)
        return any(norm == f or norm.startswith(f.rstrip("/") + "/") for f in folders)
    return not posixpath.normpath(slashed).startswith("..")
