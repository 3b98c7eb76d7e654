"""Trackers: their failures never reach training."""

import logging
import math
import sys

import pytest

from mentor_serve.errors import ConfigError
from mentor_serve.telemetry import open_tracker
from mentor_serve.telemetry.trackers import GuardedTracker


class RecordingTracker:
    def __init__(self, failure=None):
        self.rows = []
        self.calls = 0
        self.failure = failure

    def log(self, metrics, *, step):
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        self.rows.append((step, dict(metrics)))

    def close(self):
        self.calls += 1


def test_finite_numbers_are_passed_on_and_nan_is_left_out():
    inner = RecordingTracker()
    GuardedTracker(inner).log({"loss": 0.5, "grad_norm": math.nan}, step=3)
    assert inner.rows == [(3, {"loss": 0.5})]


def test_a_failing_tracker_warns_once_and_is_left_alone(caplog):
    inner = RecordingTracker(ConnectionError("no network"))
    tracker = GuardedTracker(inner)
    with caplog.at_level(logging.WARNING):
        tracker.log({"loss": 1.0}, step=1)
        tracker.log({"loss": 1.0}, step=2)
        tracker.close()
    assert inner.calls == 1
    assert len(caplog.records) == 1
    assert "no network" in caplog.text


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_a_warning(name, tmp_path, caplog, monkeypatch):
    # None in sys.modules makes an import fail as if the package were absent.
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        tracker = open_tracker(name, directory=tmp_path, run_name="run", config={})
    tracker.log({"loss": 1.0}, step=1)
    tracker.close()
    assert "trackers" in caplog.text


def test_none_records_nothing(tmp_path):
    tracker = open_tracker("none", directory=tmp_path, run_name="run", config={})
    tracker.log({"loss": 1.0}, step=1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected none, tensorboard or wandb"):
        open_tracker("mlflow", directory=tmp_path, run_name="run", config={})
