"""Recorded streams: what the probes said at every token, and what is known about the truth.

A few bytes per token, enough to judge them again without the model (`midstream.measure.rejudge`)
and to measure a monitor (`midstream.measure.report`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from midstream.kernels.tables import MAX_POSITION

if TYPE_CHECKING:
    from midstream.bank import ProbeBank
    from midstream.bundle import Bundle
    from midstream.streams import StreamReport

TIER = "tier"
"""The column that says by which strictness tier each stream was judged, where that is known."""


_PER_STREAM = ("prompt_tokens", "ended", "response_labels")
_PER_TOKEN = ("position", "logits", "labels")


class RecordingError(ValueError):
    """A recording that is none, or does not fit; the message says what was expected."""


@dataclass(frozen=True)
class Recording:
    """E streams of N tokens, P probes, H hazards.

    Attributes
    ----------
    bundle : str
        Hash of the bundle that scored them.
    probes : tuple of str
        Columns of ``logits``.
    hazards : tuple of str
        Columns of the labels.
    streams : tuple of str
        [E], each once.
    starts : int64 [E + 1]
        Stream e owns the rows ``starts[e]:starts[e + 1]``, in order of position.
    prompt_tokens : int32 [E]
    ended : bool [E]
        False where generation was cut off, by its length limit or by a halt.
    position : int32 [N]
        From the start of the prompt; a gap is a token without a score.
    logits : float32 [N, P]
        NaN where a token was not scored.
    labels : int8 [N, H]
        1, 0 or -1 (unknown); -1 at prompt tokens.
    response_labels : int8 [E, H]
    characters : int32 [N, 2], optional
        Characters of ``texts`` that each token covers; -1 where there are none.
    texts : tuple of str, optional
        [E] the responses, for a gallery.
    columns : dict of str to tuple of str
        [E] each, to break figures down by. `TIER` is the tier by which each was judged.
    probes_hash : str, optional
        `probes_hash` of the bank: two bundles with the same one read the same logits, whatever
        their chains and policies are. Without it streams cannot be judged again.

    Raises
    ------
    RecordingError
        Names what is inconsistent.
    """

    bundle: str
    probes: tuple[str, ...]
    hazards: tuple[str, ...]
    streams: tuple[str, ...]
    starts: NDArray[np.int64]
    prompt_tokens: NDArray[np.int32]
    ended: NDArray[np.bool_]
    position: NDArray[np.int32]
    logits: NDArray[np.float32]
    labels: NDArray[np.int8]
    response_labels: NDArray[np.int8]
    characters: NDArray[np.int32] | None
    texts: tuple[str, ...] | None
    columns: dict[str, tuple[str, ...]]
    probes_hash: str | None = None

    def __post_init__(self) -> None:
        streams, tokens, hazards = len(self.streams), len(self.position), len(self.hazards)
        self._check_array("starts", np.int64, (streams + 1,))
        self._check_array("prompt_tokens", np.int32, (streams,))
        self._check_array("ended", np.bool_, (streams,))
        self._check_array("position", np.int32, (tokens,))
        self._check_array("logits", np.float32, (tokens, len(self.probes)))
        self._check_array("labels", np.int8, (tokens, hazards))
        self._check_array("response_labels", np.int8, (streams, hazards))
        if self.characters is not None:
            self._check_array("characters", np.int32, (tokens, 2))
        lengths = {"texts": self.texts, **{f"columns[{k!r}]": v for k, v in self.columns.items()}}
        for name, values in lengths.items():
            if values is not None and len(values) != streams:
                raise RecordingError(f"{name}: {len(values)} entries for {streams} streams")
        for name in ("probes", "hazards", "streams"):
            for value, count in Counter(getattr(self, name)).most_common(1):
                if count > 1:
                    raise RecordingError(f"{name}: {value!r} is there {count} times")
        if not self.probes:
            raise RecordingError("probes: there are none, so nothing was recorded")
        self._check_rows()

    def _check_array(self, name: str, dtype: type, shape: tuple[int, ...]) -> None:
        found = getattr(self, name)
        if found.dtype != dtype or found.shape != shape:
            raise RecordingError(
                f"{name}: expected {np.dtype(dtype)} {list(shape)}, got {found.dtype} "
                f"{list(found.shape)}"
            )

    def _check_rows(self) -> None:
        lengths = np.diff(self.starts)
        if self.starts[0] != 0 or self.starts[-1] != len(self.position) or (lengths < 0).any():
            raise RecordingError(f"starts: must ascend from 0 to the {len(self.position)} tokens")
        if (self.prompt_tokens < 0).any():
            raise RecordingError("prompt_tokens: must be 0 or more")
        if len(self.position):
            if self.position.min() < 0 or self.position.max() >= MAX_POSITION:
                raise RecordingError(f"position: must lie between 0 and {MAX_POSITION - 1}")
            ascends = np.diff(self.position) > 0
            begins = self.starts[1:-1]
            ascends[begins[(begins > 0) & (begins < len(self.position))] - 1] = True
            if not ascends.all():
                row = int(np.argmin(ascends)) + 1
                raise RecordingError(
                    f"stream {self._stream_of(row)!r}: position {self.position[row]} follows "
                    f"{self.position[row - 1]}; positions of a stream must ascend"
                )
        for name in ("labels", "response_labels"):
            values = getattr(self, name)
            if values.size and not -1 <= values.min() <= values.max() <= 1:
                raise RecordingError(f"{name}: must be 1, 0 or -1")
        if (bad := (self.labels != -1).any(axis=1) & ~self.in_response).any():
            row = int(np.argmax(bad))
            raise RecordingError(
                f"stream {self._stream_of(row)!r}: its prompt token {self.position[row]} has a "
                "label; labels are those of response tokens"
            )

    def _stream_of(self, row: int) -> str:
        return self.streams[int(np.searchsorted(self.starts, row, side="right")) - 1]

    def __len__(self) -> int:
        """Streams."""
        return len(self.streams)

    @property
    def in_response(self) -> NDArray[np.bool_]:
        """Whether each token is one of the response, [N]."""
        return self.position >= np.repeat(self.prompt_tokens, np.diff(self.starts))

    def part(self, streams: slice) -> Recording:
        """Return the same for some streams that stand side by side."""
        first, last, _ = streams.indices(len(self))
        rows = slice(int(self.starts[first]), int(self.starts[last]))
        return replace(
            self,
            streams=self.streams[streams],
            starts=self.starts[first : last + 1] - rows.start,
            **{name: getattr(self, name)[streams] for name in _PER_STREAM},
            **{name: getattr(self, name)[rows] for name in _PER_TOKEN},
            characters=None if self.characters is None else self.characters[rows],
            texts=None if self.texts is None else self.texts[streams],
            columns={name: values[streams] for name, values in self.columns.items()},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one Parquet file; see :func:`midstream.measure.recording_file.save`."""
        from midstream.measure.recording_file import save

        save(self, path)

    @classmethod
    def load(cls, *paths: str | os.PathLike[str]) -> Recording:
        """Read one file or several; see :func:`midstream.measure.recording_file.load`."""
        from midstream.measure.recording_file import load

        return load(*paths)

    @classmethod
    def from_reports(
        cls,
        reports: Sequence[StreamReport],
        bundle: Bundle,
        *,
        streams: Sequence[str] | None = None,
        ended: Sequence[bool] | None = None,
    ) -> Recording:
        """Make a recording of live streams from the traces in their reports; nothing is labelled.

        Tokens that were sampled and never fed, as a rule the last of a stream, have no score and
        are not in it.

        Parameters
        ----------
        reports : sequence of StreamReport
        bundle : Bundle
            The one that judged them.
        streams : sequence of str, optional
            Names in place of the reports' own, each once.
        ended : sequence of bool, optional
            Whether each stream ended by itself; by default, whether its finish reason is "stop".

        Raises
        ------
        RecordingError
            For a report of another bundle, and for a trace that is shorter than its stream; the
            message says which ``trace=`` to build the monitor with.
        """
        from midstream.measure.traces import from_reports

        return from_reports(reports, bundle, streams=streams, ended=ended)


def probes_hash(bank: ProbeBank) -> str:
    """Sha256 of all that a logit depends on: where each probe reads, its norm, weight and bias."""
    digest = hashlib.sha256()
    for probe in bank.probes:
        read_out = (probe.name, str(probe.tap), probe.norm, probe.eps, probe.bias, probe.adds_to)
        digest.update(json.dumps(read_out).encode())
        digest.update(probe.weight.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def concatenate(recordings: Sequence[Recording]) -> Recording:
    """Put recordings of one bundle, with the same hazards and columns, end to end.

    Raises
    ------
    RecordingError
        When they differ in more than their streams, or one stream is in two of them.
    """
    if not recordings:
        raise RecordingError("no recording given")
    first = recordings[0]
    for other in recordings[1:]:
        for name in ("bundle", "probes_hash", "probes", "hazards"):
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise RecordingError(f"recordings differ in their {name}: {ours} and {theirs}")
        if first.columns.keys() != other.columns.keys():
            raise RecordingError(
                f"recordings differ in their columns: {sorted(first.columns)} and "
                f"{sorted(other.columns)}"
            )
        for name in ("characters", "texts"):
            if (getattr(first, name) is None) != (getattr(other, name) is None):
                raise RecordingError(f"some recordings have {name}, others have none")
    if len(recordings) == 1:
        return first

    def joined(name: str) -> Any:
        return np.concatenate([getattr(recording, name) for recording in recordings])

    def chained(parts: Iterable[tuple[str, ...] | None]) -> tuple[str, ...]:
        return tuple(value for part in parts for value in part or ())

    before = np.cumsum([0, *(len(recording.position) for recording in recordings)])
    return replace(
        first,
        streams=chained(recording.streams for recording in recordings),
        starts=np.concatenate(
            [[0], *(r.starts[1:] + offset for r, offset in zip(recordings, before, strict=False))]
        ).astype(np.int64),
        **{name: joined(name) for name in (*_PER_STREAM, *_PER_TOKEN)},
        characters=None if first.characters is None else joined("characters"),
        texts=None if first.texts is None else chained(r.texts for r in recordings),
        columns={key: chained(r.columns[key] for r in recordings) for key in first.columns},
    )


@dataclass(frozen=True)
class Judgement:
    """What a policy makes of a recording: the kernels' own risk and verdicts.

    Attributes
    ----------
    risk : float32 [N]
        NaN where a token was not judged (prompt tokens before the last, unscored ones).
    verdict : uint8 [N]
        `midstream.kernels.tables.Verdict`.
    halted_at : int32 [E]
        Position (from the start of the prompt) of the halt; -1 where there is none.
    cause : int16 [E]
    unscored : int32 [E]
    """

    risk: NDArray[np.float32]
    verdict: NDArray[np.uint8]
    halted_at: NDArray[np.int32]
    cause: NDArray[np.int16]
    unscored: NDArray[np.int32]
