"""Pages on a run of another guidance method: no mixed rollouts, whole expert trajectories."""

from __future__ import annotations

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from mentor_serve.models.reference.tokenizer import build_tokenizer
from mentor_serve.rollout.groups import expert_rollout
from mentor_serve.store import (
    NewDemonstration,
    NewGroup,
    NewTrajectory,
    StoredDemonstration,
    TrajectoryStore,
    new_id,
)
from mentor_serve.types import (
    Guidance,
    GuidanceMethod,
    Rollout,
    Score,
    StopReason,
    Task,
    TrajectoryKind,
)

TASK = Task(source="test", prompt="4 - 1 =", answer="3")
RIGHT = Score(reward=1.0, accuracy=1.0, format_score=1.0)
PAGES = ("overview", "guidance", "learner", "trajectories")


def sampled(token_ids: np.ndarray) -> Rollout:
    num_tokens = len(token_ids)
    floats = np.full(num_tokens, 0.5, np.float32)
    return Rollout(
        token_ids=token_ids,
        policy_logprobs=-floats,
        mixed_logprobs=floats * np.nan,
        expert_logprobs=floats * np.nan,
        entropies=floats,
        weights=np.zeros(num_tokens, np.float32),
        sources=np.zeros(num_tokens, np.uint8),
        policy_versions=np.zeros(num_tokens, np.int32),
        stop_reason=StopReason.EOS,
        text="3",
    )


@pytest.fixture
def demonstration_id(empty_url: str) -> str:
    """A run with one group of LUFFY; the id of the demonstration that it copies."""
    ids = build_tokenizer().encode("<think>4 - 1 = 3</think>", add_special_tokens=False)
    solution = StoredDemonstration(
        demonstration_id=new_id(),
        score=RIGHT,
        text="<think>4 - 1 = 3</think>",
        token_ids=np.asarray(ids, np.int32),
        expert_logprobs=np.full(len(ids), -0.1, np.float32),
        stop_reason=StopReason.EOS,
    )
    rollout = expert_rollout(solution, policy_version=0)
    shared = {"score": RIGHT, "prompt_token_ids": [1, 2]}
    expert = {"kind": TrajectoryKind.EXPERT, "expert_model": "embedded:expert", **shared}
    attempt = NewTrajectory(rollout=rollout, sample_index=0, **expert)
    copy = NewTrajectory(
        rollout=rollout, sample_index=0, demonstration_id=solution.demonstration_id, **expert
    )
    own = [
        NewTrajectory(
            rollout=sampled(solution.token_ids),
            kind=TrajectoryKind.ON_POLICY,
            sample_index=index,
            **shared,
        )
        for index in range(2)
    ]
    with TrajectoryStore(empty_url) as store:
        run_id = store.open_run("luffy", {})
        item = NewDemonstration(demonstration_id=solution.demonstration_id, trajectory=attempt)
        store.add_demonstrations(run_id, TASK, [item])
        group = NewGroup(
            group_id=new_id(),
            task=TASK,
            guidance=Guidance(),
            trajectories=[*own, copy],
            method=GuidanceMethod.LUFFY,
        )
        store.add_group(run_id, group)
    return solution.demonstration_id


def open_page(name: str, **query: str) -> AppTest:
    script = f"from mentor_dashboard.pages import {name}\n{name}.page()\n"
    app = AppTest.from_string(script, default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, app.exception
    return app


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.usefixtures("demonstration_id")
def test_every_page_draws_a_run_without_mixed_rollouts(name: str) -> None:
    app = open_page(name)
    assert not app.warning
    assert not app.error
    assert app.selectbox[0].value == "luffy"


@pytest.mark.usefixtures("demonstration_id")
def test_expert_trajectories_are_listed_but_not_as_replacements() -> None:
    app = open_page("trajectories")
    assert sorted(app.dataframe[0].value["kind"]) == ["expert"] * 2 + ["on-policy"] * 2
    app.toggle(key="replaced").set_value(True).run()
    assert not app.exception
    assert len(app.dataframe) == 0 or app.dataframe[0].value.empty


def test_a_demonstration_is_drawn_as_the_experts(demonstration_id: str) -> None:
    app = open_page("trajectories", trajectory=demonstration_id)
    assert app.subheader[0].value == "Expert response, correct (reward 1.00)"
    (html,) = (item.proto.body for item in app.get("html") if "mentor-text" in item.proto.body)
    assert 'class="mentor-expert" title=' in html
    assert 'class="mentor-policy" title=' not in html
    assert "log-prob: policy not asked, expert -0.100" in html
