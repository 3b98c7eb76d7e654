"""What a benchmark ran on, and the options about it that all benchmarks share."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and in which precision models run."""

    device: str
    dtype: str
    threads: int
    """Threads of torch within one operation."""

    def describe(self) -> dict[str, Any]:
        """What a reader needs to judge absolute numbers, as JSON."""
        return {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": self.threads,
            "device": self.device,
            "accelerator": _accelerator(self.device),
            "dtype": self.dtype,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, `--dtype`, `--threads`, `--json`."""
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=positive_int, help="torch threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def positive_int(text: str) -> int:
    """A command-line number of at least 1 (`type` of an argparse option)."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def machine_of(arguments: argparse.Namespace) -> Machine:
    """Apply what `add_machine_options` parsed."""
    threads = arguments.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    return Machine(device=arguments.device, dtype=arguments.dtype, threads=threads)


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock can be read."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def report_progress(message: str) -> None:
    """One line on standard error; standard output belongs to the result."""
    print(message, file=sys.stderr, flush=True)


def processor() -> str:
    """Its name, as the system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _accelerator(device: str) -> str | None:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
