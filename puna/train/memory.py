"""How a process keeps memory that it has freed."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next; another C library is left as it is.

    A step's tensors are as large in every step. By default arrays beyond a threshold are mapped anew each time, and
    every one of their pages costs a fault: a tenth of a step and more.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            library.mallopt(option, 1 << 30)
