"""Recorded streams: what the probes said at every token, and what is known about the truth.

A few bytes per token, enough to judge them again without the model (`midstream.measure.rejudge`)
and to measure a monitor (`midstream.measure.report`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from midstream.kernels.tables import MAX_POSITION

if TYPE_CHECKING:
    from midstream.bank import ProbeBank
    from midstream.bundle import Bundle
    from midstream.streams import StreamReport

TIER = "tier"
"""The column that says by which strictness tier each stream was judged, where that is known."""


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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one Parquet file, which appears whole or not at all.

        See `midstream.measure.recording_file`.
        """
        from midstream.measure.recording_file import save

        save(self, path)

    @classmethod
    def load(cls, *paths: str | os.PathLike[str]) -> Recording:
        """Read one file, or several with the same probes, hazards and columns, end to end.

        See `midstream.measure.recording_file`.
        """
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
        """Make a recording of live streams from their reports' traces; nothing is labelled.

        Parameters
        ----------
        reports : sequence of StreamReport
        bundle : Bundle
            The one that judged them.
        streams : sequence of str, optional
            Names in place of the reports' own, which must not occur twice.
        ended : sequence of bool, optional
            Whether each stream ended by itself; by default, whether its finish reason is "stop".
        """
        raise NotImplementedError


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
