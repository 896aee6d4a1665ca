"""Rows of many kernels, compiled by several processes."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Sequence

from rosa_fx.kernels.report.rows import Row


def _job(item: tuple[str, str, bool]) -> list[Row]:
    """Rows of one kernel on one architecture."""
    import torch

    from rosa_fx.kernels.report.architectures import ARCHITECTURES
    from rosa_fx.kernels.report.kernels import KERNELS
    from rosa_fx.kernels.report.measure import measure

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, arch, only_default = item
    (kernel,) = [kernel for kernel in KERNELS if kernel.name == name]
    return list(measure(kernel, ARCHITECTURES[arch], only_default))


def collect(kernels: Sequence[str], archs: Sequence[str], only_default: bool, jobs: int) -> list[Row]:
    """Rows of every kernel on every architecture, in that order."""
    items = [(kernel, arch, only_default) for arch in archs for kernel in kernels]
    if jobs <= 1 or len(items) == 1:
        found = map(_job, items)
        return [row for rows in found for row in rows]
    # A fresh process per worker: compilers keep threads, which a fork would lose.
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(items))) as pool:
        return [row for rows in pool.imap(_job, items) for row in rows]
