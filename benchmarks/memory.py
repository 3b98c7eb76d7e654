"""Peak memory of a piece of work beyond what was held when it began.

On a CUDA device this is torch's own accounting. On a CPU it is the growth of the process's peak
resident set (VmHWM in /proc/self/status, which Linux resets on request), so the work must run in a
process of its own, once the models are loaded and have run once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_growth(work: Callable[[], object], *, device: str) -> int:
    """Bytes at the peak of `work` beyond those before it.

    Raises:
        RuntimeError: this system does not tell (Linux or a CUDA device is needed).
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if not _RESET.exists():
        raise RuntimeError(f"peak memory: expected Linux's {_RESET}, which is not there")
    _RESET.write_text(_RESET_PEAK)
    resident = _kilobytes("VmRSS")
    work()
    return 1024 * (_kilobytes("VmHWM") - resident)


def _kilobytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise RuntimeError(f"peak memory: expected {field} in {_STATUS}")
