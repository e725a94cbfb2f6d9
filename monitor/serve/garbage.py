"""Python's garbage collector: it is not to stop every stream, nor to let garbage pile up."""

from __future__ import annotations

import gc

_MUCH = 2_000  # objects that came since it last looked
_OFTEN = 8  # times that it looks through what came lately for once through everything


def freeze() -> None:
    """Let it leave alone what is there, and look of itself only where `collect` does not.

    It would look through all modules of torch and the rest every now and then, and stop every
    stream meanwhile, for 140 ms and more. And as it does so only once there is a quarter more than
    it kept the last time, what thousands of ended streams leave in cycles would wait for it: a
    worker that ended 15 a second grew by 27 MB per minute.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # the quarter is now one of next to nothing
    gc.set_threshold(10 * _MUCH, 5, 2)


def collect() -> None:
    """Let it look through what came lately; to be called where no token waits.

    With 200 streams it takes 1 to 20 ms, which of itself it would take while it makes the events of
    a step's tokens, since that is when most objects come.
    """
    since, _, looked = gc.get_count()
    if since >= _MUCH:
        gc.collect(2 if looked >= _OFTEN else 1)
