"""Recorded streams: what the probes said at every token, and what is known about the truth.

A few bytes per token, enough to judge them again without the model (`midstream.measure.rejudge`)
and to measure a monitor (`midstream.measure.report`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
        [E]
    starts : int64 [E + 1]
        Stream e owns the rows ``starts[e]:starts[e + 1]``, in order of position.
    prompt_tokens : int32 [E]
    ended : bool [E]
        False where generation was cut off.
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
        [E] each, to break figures down by.
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
