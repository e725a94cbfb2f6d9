"""Several ranks that sample the same rows: one of them decides.

With tensor parallel every rank sees the same residual stream, and a row's logits do not depend on
the rows beside it, so all ranks come to the same verdict by themselves as long as the all-reduce
gives each the same bits. No engine promises that, and ranks that disagree about a halt would sample
different tokens: :class:`Agreement` copies the verdicts of one rank to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from midstream.kernels.tables import SlotTable
from midstream.taps import Tap

TIMEOUT = timedelta(seconds=30)
"""After this long a rank that does not answer is taken for lost."""


class RankLostError(RuntimeError):
    """Another rank did not answer, so nobody knows what may leave: nothing may."""


class OtherStageError(ValueError):
    """A tap on a pipeline stage other than the one that samples."""


class Agreement:
    """Copies the first rank's verdicts to the others; call it after `Monitor.advance`.

    Costs one broadcast of one byte per slot. On a GPU (NCCL) it is enqueued on the current stream
    and can be captured in a CUDA graph: the address does not change and the host does not wait;
    there a lost rank is NCCL's watchdog's to find, after the group's own timeout. With gloo the
    host waits, at most ``timeout``.

    Parameters
    ----------
    slots : SlotTable
        Of this rank's monitor. Streams must have the same slot on every rank, as they have when all
        ranks admit and retire in the same order.
    group : ProcessGroup
        Ranks that sample the same rows. The verdicts of its rank 0 count, and only the reports of
        that rank are the truth.
    timeout : timedelta
    """

    def __init__(
        self,
        slots: SlotTable,
        group: dist.ProcessGroup,
        *,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        self._verdict: Tensor = slots.verdict
        self._group = group
        self._source = dist.get_global_rank(self._group, 0)
        self._timeout = timeout

    def __call__(self) -> None:
        """Make the verdicts of the rank that decides those of this rank.

        Raises
        ------
        RankLostError
            When a rank died, or does not answer in time.
        """
        try:
            work = dist.broadcast(self._verdict, self._source, group=self._group, async_op=True)
            if self._verdict.is_cuda:
                work.wait()  # lets the stream wait, not the host
            else:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise RankLostError(
                f"rank {dist.get_rank()} got no verdicts from rank {self._source}: {error}; let "
                "nothing leave, and start the engine again"
            ) from error


def check_last_stage(taps: Sequence[Tap], first_layer: int) -> None:
    """Refuse taps that another pipeline stage than the last would have to read.

    Parameters
    ----------
    taps : sequence of Tap
        Of the bundle.
    first_layer : int
        Of the last stage, which samples and so decides.

    Raises
    ------
    OtherStageError
    """
    others = [str(tap) for tap in taps if tap.layer < first_layer]
    if others:
        raise OtherStageError(
            f"the last pipeline stage begins at layer {first_layer} and never sees "
            f"{', '.join(others)}: use tensor parallel, a split with these layers in the last "
            "stage, or probes on later layers"
        )
