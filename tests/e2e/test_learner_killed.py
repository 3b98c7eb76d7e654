"""kill -9 of the learner's process in the running service: training goes on by itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from service_checks import assert_every_group_was_used_once

from mentor_serve.weights import read_snapshot

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_KILLS = 3
RECOVERY_S = 30.0
"""From a kill to the next new version that replicas serve."""
LIVE = "select version, sha256, path from policy_versions where is_live"


def test_a_killed_learner_is_back_with_a_new_version_within_half_a_minute(
    start_service: Callable[..., Any],
) -> None:
    rng = random.Random(3)
    service = start_service()
    service.wait_for_step(2)
    for _ in range(NUM_KILLS):
        time.sleep(rng.uniform(0.0, 2.0))  # an update of the bundled pair takes less than that
        ((before,),) = service.query("select max(version) from policy_versions")
        assert service.kill_process("LearnerActor") == 1
        service.wait_for(
            lambda before=before: service.query(LIVE)[0][0] > before,
            f"a version after {before}",
            timeout_s=RECOVERY_S,
        )
        assert_every_group_was_used_once(service)
    versions = [row[0] for row in service.query("select version from policy_versions order by 1")]
    assert versions == list(range(len(versions)))

    service.interrupt()
    ((_, sha256, path),) = service.query(LIVE)
    assert read_snapshot(Path(path), verify=True).sha256 == sha256
