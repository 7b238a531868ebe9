"""The C library's heap."""

import contextlib
import ctypes

# Of mallopt(3). A block from the one size on is mapped by itself and given back when freed; as much free memory at the
# end of the heap is given back too. The first cannot be larger, and the second is an int.
M_TRIM_THRESHOLD, TRIM = -1, 2**31 - 1
M_MMAP_THRESHOLD, MMAP = -3, 32 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep what it frees for what it allocates next; where the C library is not glibc, do nothing.

    A step on a CPU frees and allocates hundreds of megabytes of activations. To give them back to the kernel and fetch
    them again, zeroed, page by page, took a tenth of a step of ViT-S.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP)
        mallopt(M_TRIM_THRESHOLD, TRIM)
