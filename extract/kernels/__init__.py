"""Code that only makes a CPU faster, and could be deleted: own dropout and attention of few queries, grids cut by
length, memory that is kept for the next buffer, OpenMP threads that do not spin.

One switch: with PIPELINE_KERNELS=off in the environment torch's own kernels and the system's settings serve instead.
What changes the whole process is asked for by the command line, by extraction and by training, never by a stream in a
process of the user's.
"""

import os


def enabled() -> bool:
    """Whether these are to be used."""
    return os.environ.get("PIPELINE_KERNELS") != "off"


def spin_briefly() -> None:
    """Let OpenMP's waiting threads spin for microseconds, not milliseconds; to be called before torch is imported, when
    OpenMP reads it. Where another program (or our own thread that makes the next batch) holds the processor, a
    step of small products otherwise takes several times as long."""
    if enabled() and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
