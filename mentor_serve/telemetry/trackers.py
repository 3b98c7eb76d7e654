"""Optional experiment trackers: one call an update, and never a reason for training to stop.

`none` (default), `tensorboard` or `wandb`; the latter two come with the extra `trackers` and are
imported only when asked for. The first failure of a tracker is one warning; it is then left alone.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from mentor_serve.errors import ConfigError

_log = logging.getLogger(__name__)

TrackerName = Literal["none", "tensorboard", "wandb"]


class Tracker(Protocol):
    """Receives the numbers of each update."""

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record numbers under the learner's step."""

    def close(self) -> None:
        """Write out what is buffered."""


class NoTracker:
    """Records nothing."""

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class TensorBoardTracker:
    """Event files that `tensorboard --logdir` reads."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """One scalar each."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run; `WANDB_PROJECT`, `WANDB_MODE` and the like are honoured."""

    def __init__(self, directory: Path, *, run_name: str, config: Mapping[str, Any]) -> None:
        # By name: the module is an optional extra that type checkers may not find.
        wandb: Any = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            dir=str(directory), name=run_name, config=dict(config), resume="allow"
        )

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """One row."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class GuardedTracker:
    """Keeps a tracker's failure away from training: one warning, then silence."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker: Tracker = tracker

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Pass on the finite numbers."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        try:
            self._tracker.log(finite, step=step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the tracker."""
        try:
            self._tracker.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        _log.warning("the tracker failed and is no longer used; training goes on: %r", error)
        self._tracker = NoTracker()


def open_tracker(
    name: TrackerName, *, directory: Path, run_name: str, config: Mapping[str, Any]
) -> Tracker:
    """The tracker called `name`; one that cannot be started is a warning and records nothing.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in ("none", "tensorboard", "wandb"):
        raise ConfigError(f"tracker: expected none, tensorboard or wandb, got {name!r}")
    if name == "none":
        return NoTracker()
    try:
        if name == "tensorboard":
            return GuardedTracker(TensorBoardTracker(directory))
        return GuardedTracker(WandbTracker(directory, run_name=run_name, config=config))
    except Exception as error:
        _log.warning(
            "tracker %s cannot be started, training goes on without (is the extra "
            "`mentor-serve[trackers]` installed?): %r",
            name,
            error,
        )
        return NoTracker()
