"""What `mentor-serve rollouts replay` does: finds rows and weights, and has them computed again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_serve.actors.learner_options import learner_config, training_options
from mentor_serve.actors.runtime import open_store, verified_snapshot
from mentor_serve.errors import ConfigError, WeightsError
from mentor_serve.learner.replay import (
    DEFAULT_TOLERANCE,
    UPDATE_TOLERANCE,
    ReplayReport,
    replay_rollouts,
    replay_update,
)
from mentor_serve.learner.replay.rollouts import Sampled
from mentor_serve.learner.replay.updates import StoredUpdate
from mentor_serve.models.loading import load_model
from mentor_serve.reports.status import existing_run
from mentor_serve.settings import Settings, load_settings
from mentor_serve.store import LeasedGroup, RunHistory, TrajectoryRecord, TrajectoryStore
from mentor_serve.types import TrajectoryKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_THE_RUN = ("guidance", "learner", "policy", "rollout")
"""Sections that decide what stored numbers mean."""


def replay_settings(config: Iterable[Path], overrides: dict[str, Any]) -> Settings:
    """The settings of the run's last start where they decide numbers; `overrides` go before them.

    Where the run is (state directory, database, name) comes from files and environment, as always.

    Raises:
        ConfigError: there is no such run.
    """
    config = list(config)
    settings = load_settings(config, overrides)
    with open_store(settings, mode="read") as store:
        run_id = existing_run(settings, store)
    with RunHistory(settings.database_url, run_id) as history:
        stored = history.config()
    sections = settings.model_dump()
    of_run = {
        f"{section}.{key}": value
        for section in _OF_THE_RUN
        for key, value in stored.get(section, {}).items()
        # A run of another release may have settings that are no more.
        if key in sections[section]
    }
    return load_settings(config, of_run | overrides)


def replay(
    settings: Settings, identifier: str | None, *, step: int | None, tolerance: float | None
) -> ReplayReport:
    """Replay a trajectory or a group (`identifier`), or an update (`step`).

    Raises:
        ConfigError: nothing of that name is stored, or it is of a kind without recorded numbers.
        WeightsError: weights that are needed are not kept, or damaged.
        StoreError: groups or tokens are gone.
    """
    if tolerance is None and step is not None:
        tolerance = UPDATE_TOLERANCE[settings.learner.autocast]
    elif tolerance is None:
        tolerance = DEFAULT_TOLERANCE[settings.policy.dtype]
    with open_store(settings, mode="read") as store:
        run_id = existing_run(settings, store)
        with RunHistory(settings.database_url, run_id) as history:
            replayed = _Replay(settings, store, run_id, history)
            if step is not None:
                return replayed.update(step, tolerance=tolerance)
            if identifier is None:
                raise ConfigError("expected the id of a trajectory or group, or --step N; got none")
            return replayed.rollouts(identifier, tolerance=tolerance)


class _Replay:
    """One run's store, history and kept weights."""

    def __init__(
        self, settings: Settings, store: TrajectoryStore, run_id: str, history: RunHistory
    ) -> None:
        self._settings = settings
        self._store = store
        self._run_id = run_id
        self._history = history

    def rollouts(self, identifier: str, *, tolerance: float) -> ReplayReport:
        rows = self._history.trajectories(identifier)
        usable = [row for row in rows if row.status == "ok" and row.num_tokens]
        if not usable:
            raise ConfigError(_why_nothing(identifier, rows))
        group_id = usable[0].group_id
        if group_id is None:
            kind = usable[0].kind
            raise ConfigError(
                f"{identifier} is a {kind} response, which belongs to no group: at which "
                "temperature and gamma it was sampled is not stored; choose one of a group"
            )
        group = self._history.group(group_id)
        by_id = {} if group is None else {i.trajectory_id: i for i in group.trajectories}
        if group is None or not {row.id for row in usable} <= by_id.keys():
            raise ConfigError(f"the tokens of {identifier} are pruned; choose a newer one")
        sampled = [Sampled(trajectory=by_id[row.id], row=row) for row in usable]
        if all(row.kind == TrajectoryKind.EXPERT for row in usable):
            raise ConfigError(
                f"{identifier} was written by the expert alone: nothing of the policy is recorded "
                "with it; choose an on-policy or mixed one"
            )
        config = learner_config(self._settings)
        return replay_rollouts(
            group,
            sampled,
            subject=_subject(identifier, group, usable),
            load_version=lambda version: self._model(version, self._settings.policy.dtype),
            temperature=config.update.temperature,
            alpha=self._alpha(group),
            advantages=config.advantages,
            tolerance=tolerance,
        )

    def update(self, step: int, *, tolerance: float) -> ReplayReport:
        record = self._history.update(step)
        if record is None:
            raise ConfigError(f"--step {step}: the run has no such update")
        produced = self._store.version(self._run_id, record.policy_version)
        before = None
        if produced is not None and produced.parent_version is not None:
            before = self._store.version(self._run_id, produced.parent_version)
        if before is None:
            raise ConfigError(f"--step {step}: the version that it started from is not stored")
        stored = StoredUpdate(
            record=record, groups=self._history.groups_of_step(step), before=before
        )
        return replay_update(
            stored,
            self._model(before.version, "float32"),
            config=learner_config(self._settings),
            options=training_options(self._settings),
            tolerance=tolerance,
        )

    def _alpha(self, group: LeasedGroup) -> float:
        """Of the update that consumed the group; of its sampling where none did yet."""
        step = self._history.consumed_by(group.group_id)
        update = None if step is None else self._history.update(step)
        return group.alpha if update is None else update.alpha

    def _model(self, version: int, dtype: str) -> PreTrainedModel:
        record = self._store.version(self._run_id, version)
        if record is None:
            raise WeightsError(f"expected version {version} in the store, found none")
        path = verified_snapshot(self._settings, record)
        return load_model(path, dtype=dtype, device=self._settings.policy.device)


def _why_nothing(identifier: str, rows: list[TrajectoryRecord]) -> str:
    if not rows:
        return (
            f"{identifier}: the run has no trajectory or group of that id; "
            "GET /v1/trajectories and the table `trajectories` list them"
        )
    return f"{identifier} failed ({rows[0].error}): there is nothing to compute again"


def _subject(identifier: str, group: LeasedGroup, rows: list[TrajectoryRecord]) -> str:
    if identifier == group.group_id:
        return f"group {identifier} ({len(rows)} trajectories)"
    return f"{rows[0].kind} trajectory {identifier}"
