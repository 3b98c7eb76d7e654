"""What must hold in the database of a service after whatever happened to it."""

from __future__ import annotations

from typing import Any


def assert_every_group_was_used_once(service: Any) -> None:
    """Updates are numbered without a gap, and each consumed exactly the groups it says."""
    steps = [row[0] for row in service.query("select step from updates order by step")]
    assert steps == list(range(1, len(steps) + 1))
    differing = service.query(
        "select u.step from updates u where u.num_groups != "
        "(select count(*) from rollout_groups g where g.consumed_by_step = u.step)"
    )
    assert differing == []
    incomplete = service.query(
        "select g.id from rollout_groups g where g.status != 'failed' and "
        "(select count(*) from trajectories t where t.group_id = g.id) "
        "!= g.num_on_policy + g.num_mixed + g.num_expert"
    )
    assert incomplete == []
    assert service.query("pragma integrity_check") == [("ok",)]
