"""Python's garbage collector: it is not to stop every stream, nor to let garbage pile up."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Let it leave alone what is there, and look through what comes often.

    It would look through all modules of torch and the rest every now and then, and stop every
    stream meanwhile, for 140 ms and more. And as it does so only once there is a quarter more than
    it kept the last time, what thousands of ended streams leave in cycles would wait for it: a
    worker that ended 15 a second grew by 27 MB per minute. Looking through what came since takes
    a few milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # the quarter is now one of next to nothing
    gc.set_threshold(1000, 5, 2)
