"""Memory of large CPU tensors: huge pages, and reuse of freed blocks.

The C library returns every large freed block to the system, so the pages of each new ``[T, N, ...]`` tensor
are mapped again. For the time loop that takes several times longer than its arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_is_glibc = hasattr(_libc, "gnu_get_libc_version")
_keeps_memory = False


def advise_huge_pages(t: Tensor) -> Tensor:
    """Ask the kernel for 2 MiB pages for a new CPU tensor that is not written yet; a hint."""
    start = -(-t.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (t.data_ptr() + t.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if _libc is not None and length > 0:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return t


def release_freed_memory() -> None:
    """Return to the system the pages of freed blocks that malloc keeps between other blocks.

    Call it before memory use peaks. After :func:`disable_malloc_trim` it does nothing.
    """
    if _is_glibc and not _keeps_memory:
        _libc.malloc_trim(ctypes.c_size_t(0))


def disable_malloc_trim() -> bool:
    """Turn off malloc's trimming, so that the process reuses freed memory instead of returning it.

    Call it once before training on the CPU: it speeds up everything that allocates large tensors, not only
    neurons. The process then keeps its peak memory until it ends.

    Returns:
        Whether it took effect; ``False`` where the C library is not glibc.
    """
    global _keeps_memory
    if not _is_glibc:
        return False
    _keeps_memory = bool(_libc.mallopt(M_MMAP_MAX, 0) and _libc.mallopt(M_TRIM_THRESHOLD, -1))
    return _keeps_memory
