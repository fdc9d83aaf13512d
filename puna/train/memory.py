"""How a process keeps memory that it has freed."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
MOST_UNUSED = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep up to 2 GiB of freed memory for what is allocated next; elsewhere nothing happens.

    By default arrays beyond a threshold are mapped anew each time, and every one of their pages costs a fault: a step
    that frees and allocates the same gigabytes over and over pays a tenth of its time and more for it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MOST_UNUSED)
