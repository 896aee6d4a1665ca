"""Let the C allocator keep large blocks: mapping and unmapping every large temporary costs more than filling it."""

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_INT_MAX = 2**31 - 1


def tune_allocator() -> bool:
    """Serve blocks below 2 GiB from the heap and do not give the heap's top back; True if the allocator took it.

    By default glibc maps every block above 32 MiB (and at first above 128 KiB) anew and unmaps it when freed, so that
    each large temporary is paid for in page faults. The price is that freed memory stays with the process. It holds for
    the whole process and cannot be undone. Does nothing outside glibc on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        libc.gnu_get_libc_version()  # absent in musl, whose mallopt (if any) means something else
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    # Older glibc refuses thresholds above 32 MiB; forbidding mappings altogether has the same effect there.
    kept = mallopt(_M_MMAP_THRESHOLD, _INT_MAX) or mallopt(_M_MMAP_MAX, 0)
    return bool(kept) and bool(mallopt(_M_TRIM_THRESHOLD, _INT_MAX))
