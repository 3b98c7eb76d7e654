"""What `mentor-serve weights` and `mentor-serve export` do."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mentor_serve import __version__
from mentor_serve.actors.runtime import open_store, owned_state, verified_snapshot
from mentor_serve.errors import ConfigError, WeightsError
from mentor_serve.reports.service import call_service, serves_run
from mentor_serve.reports.status import existing_run
from mentor_serve.settings import Settings
from mentor_serve.store import RunHistory, TrajectoryStore, VersionRecord
from mentor_serve.weights import PublishReport, Snapshot, list_snapshots
from mentor_serve.weights.export import check_target, export_model
from mentor_serve.weights.snapshots import WEIGHTS, verify_file


def list_weights(settings: Settings, *, verify: bool) -> list[dict[str, Any]]:
    """Every version of the run, newest first, and what of it is on disk.

    `verified` is None unless `verify` asked for the hash and the version is kept.

    Raises:
        ConfigError: there is no such run yet.
    """
    with open_store(settings, mode="read") as store:
        versions = store.list_versions(existing_run(settings, store))
    kept = {snapshot.version: snapshot for snapshot in list_snapshots(settings.weights_dir)}
    now = datetime.now(UTC)
    return [
        _listed(version, kept.get(version.version), now=now, verify=verify)
        for version in reversed(versions)
    ]


def _listed(
    version: VersionRecord, snapshot: Snapshot | None, *, now: datetime, verify: bool
) -> dict[str, Any]:
    created_at = version.created_at or now
    row = {
        "version": version.version,
        "step": version.step,
        "parent_version": version.parent_version,
        "is_live": version.is_live,
        "is_kept": snapshot is not None,
        "num_bytes": None,
        "sha256": version.sha256,
        "verified": None,
        "problem": None,
        "created_at": created_at.isoformat(),
        "age_s": (now - created_at).total_seconds(),
        "path": version.path,
    }
    if snapshot is None:
        return row
    row["path"] = str(snapshot.path)
    try:
        files = [path for path in snapshot.path.rglob("*") if path.is_file()]
        row["num_bytes"] = sum(path.stat().st_size for path in files)
        if verify:
            verify_file(snapshot.path / WEIGHTS, version.sha256 or snapshot.sha256)
            row["verified"] = True
    except (OSError, WeightsError) as error:
        if not snapshot.path.exists():
            # The learner of a running service has pruned it since it was listed.
            return row | {"is_kept": False, "num_bytes": None, "path": version.path}
        row |= {"verified": False if verify else None, "problem": str(error)}
    return row


class _NoReplicas:
    """`Broadcaster` where no service runs: the next one starts with the newest version."""

    def publish(self, snapshot: Snapshot) -> PublishReport:
        """Nobody to tell."""
        return PublishReport(version=snapshot.version, num_replicas=0)


def roll_back(settings: Settings, version: int) -> dict[str, Any]:
    """Make the weights of a kept version the newest version; history stays.

    Through the service's learner where one runs; else on database and directories, under the locks
    of the state directory and of the learner.

    Raises:
        ConfigError: no such run or version, a wrong key, or a service that does not answer over
            HTTP owns the state directory.
        WeightsError: the version's snapshot is gone or damaged, or a learner runs elsewhere.
    """
    with open_store(settings, mode="read") as store:
        run_id = existing_run(settings, store)
        _require_version(store, run_id, version)
    if serves_run(settings, run_id):
        answer = call_service(settings, "POST", "/v1/weights/rollback", {"version": version})
        return {**answer, "through": "service"}
    # Here, not above: no other command of these needs Ray and torch, which take seconds to import.
    from mentor_serve.actors.learner import roll_back_alone

    with owned_state(settings), open_store(settings) as store:
        record = roll_back_alone(settings, store, version, _NoReplicas())
    return {**asdict(record), "through": "directories"}


def export_version(settings: Settings, name: str, target: Path, *, dtype: str) -> dict[str, Any]:
    """Write a kept version (`latest` or a number) as a Hugging Face directory.

    Raises:
        ConfigError: no such run or version, or the target is there already.
        WeightsError: the version is not kept, or its file is damaged.
    """
    check_target(target)
    with open_store(settings, mode="read") as store:
        run_id = existing_run(settings, store)
        if name == "latest":
            version = store.latest_version(run_id)
            if version is None:
                raise ConfigError(f"run {settings.run_name!r} has no version yet")
        else:
            number = name.removeprefix("policy@")
            if not number.isdecimal():
                raise ConfigError(f"{name}: expected a version or `latest`")
            version = _require_version(store, run_id, int(number))
    with RunHistory(settings.database_url, run_id) as history:
        config = history.config()
    source = verified_snapshot(settings, version)
    card = model_card(settings, run_id, version, dtype=dtype, config=config)
    exported = export_model(source, target, dtype=dtype, card=card)
    return {
        "version": version.version,
        "step": version.step,
        "dtype": dtype,
        "path": str(exported.path),
        "num_bytes": exported.num_bytes,
        "files": exported.files,
    }


def _require_version(store: TrajectoryStore, run_id: str, number: int) -> VersionRecord:
    version = store.version(run_id, number)
    if version is None:
        raise ConfigError(
            f"version {number}: expected a version of this run; see `mentor-serve weights list`"
        )
    return version


def model_card(
    settings: Settings,
    run_id: str,
    version: VersionRecord,
    *,
    dtype: str,
    config: dict[str, Any],
) -> str:
    """The card: where the weights come from and under which settings they were trained."""
    created_at = "" if version.created_at is None else version.created_at.isoformat()
    facts = {
        "run": f"{settings.run_name} ({run_id})",
        "policy version": version.version,
        "updates": version.step,
        "parent version": "none" if version.parent_version is None else version.parent_version,
        "created": created_at,
        "SHA-256 of the snapshot": version.sha256,
        "dtype": dtype,
        "initial policy": config.get("policy", {}).get("model", "unknown"),
        "expert": config.get("expert", {}).get("model", "unknown"),
        "written by": f"mentor-serve {__version__}",
    }
    table = "\n".join(f"| {label} | {value} |" for label, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- reinforcement-learning
- mentor
---

# {settings.run_name}, policy version {version.version}

A policy trained by mixed-policy GRPO with selective expert guidance (MENTOR, arXiv 2510.04140).

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_DIRECTORY")
```

`sha256sum -c SHA256SUMS` checks the files.

## Settings of the run

```json
{json.dumps(config, indent=2, sort_keys=True)}
```
"""
