"""Arithmetic stays in the thread that asks for it.

The libraries below NumPy and FAISS split even small products over all cores and spin while they wait for each other:
measured beside busy models, advice on seven arms took ten times the CPU time it takes in one thread, and rounded
differently from one call to the next. The cores belong to the models.
"""

from __future__ import annotations

from threadpoolctl import threadpool_limits


def one_thread_each() -> None:
    """From now on every arithmetic library loaded so far uses the caller's thread alone, in the whole process."""
    threadpool_limits(limits=1)
