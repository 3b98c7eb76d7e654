"""The baselines as settings of the whole service, with the expert in either place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from service_checks import assert_every_group_was_used_once

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_TASKS = 6
FEW_TASKS = {"MENTOR_SERVE_TASKS__SIZE": str(NUM_TASKS)}
USABLE = "kind = 'expert' and group_id is null and accuracy >= 1 and stop_reason != 'length'"


def settle(service: Any) -> None:
    """Let it train, then end it, so that nothing changes while it is looked at."""
    service.wait_for_step(3, timeout_s=200)
    assert service.interrupt() == 0
    assert_every_group_was_used_once(service)
    # A task that comes again is served from the store.
    (num_groups,) = service.query("select count(*) from rollout_groups where status != 'failed'")[0]
    (num_usable,) = service.query(f"select count(*) from trajectories where {USABLE}")[0]
    assert num_groups > NUM_TASKS >= num_usable >= 1


def test_luffy_trains_on_trajectories_of_the_expert_beside_the_policy(
    start_service: Callable[..., Any],
) -> None:
    service = start_service(env=FEW_TASKS | {"MENTOR_SERVE_GUIDANCE__METHOD": "luffy"})
    settle(service)
    consumed = service.query(
        "select num_on_policy, num_expert, num_mixed from rollout_groups where status = 'consumed'"
    )
    # Four places: the expert has one where it has a solution.
    assert set(consumed) <= {(3, 1, 0), (4, 0, 0)}
    assert (3, 1, 0) in consumed
    copies = service.query(
        "select count(*) from trajectories t join trajectories d on d.id = t.demonstration_id "
        "where t.kind = 'expert' and d.group_id is null and d.text = t.text"
    )
    joined = service.query("select sum(num_expert) from rollout_groups")
    assert copies == joined


def test_questa_shows_solutions_of_a_remote_expert(start_service: Callable[..., Any]) -> None:
    service = start_service(
        env=FEW_TASKS
        | {
            "MENTOR_SERVE_GUIDANCE__METHOD": "questa",
            "MENTOR_SERVE_EXPERT__PLACEMENT": "remote",
        }
    )
    settle(service)
    groups = service.query(
        "select num_on_policy, num_mixed, num_expert, num_hint_tokens > 0, hint_fraction "
        "from rollout_groups where status = 'consumed'"
    )
    assert set(groups) <= {(4, 0, 0, 1, 0.5), (4, 0, 0, None, None)}
    assert (4, 0, 0, 1, 0.5) in groups
    prompts = service.query("select distinct prompt from tasks where prompt like '%Hint%'")
    assert prompts == []
