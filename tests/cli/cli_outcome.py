"""What a command of the command line did."""

from dataclasses import dataclass


@dataclass
class Outcome:
    exit_code: int
    out: str
    err: str
