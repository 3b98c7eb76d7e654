"""Strategies as pure functions of an occasion."""

import numpy as np
import pytest
from rollout_fakes import FakeTokenizer

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.groups import derive_seed
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.strategies import (
    GroupShape,
    GuidanceConfig,
    HintSchedule,
    Occasion,
    build_strategy,
)
from mentor_serve.store import StoredDemonstration
from mentor_serve.types import Guidance, GuidanceMethod, Score, StopReason, Task

SHAPE = GroupShape(num_on_policy=8, num_mixed=4)
TASK = Task(source="test", prompt="1+1?", answer="2")
RENDERER = PromptRenderer(FakeTokenizer())  # type: ignore[arg-type]
HEADER = "## Hint: Partial Solution"


def demonstration(text: str = "<think>one and one", *, number: int = 0, ends: bool = True):
    token_ids = [ord(character) for character in text] + [0] * ends
    return StoredDemonstration(
        demonstration_id=f"demonstration {number}",
        score=Score(reward=1.0, accuracy=1.0, format_score=1.0),
        text=text,
        token_ids=np.asarray(token_ids, np.int32),
        expert_logprobs=np.zeros(len(token_ids), np.float32),
        stop_reason=StopReason.EOS if ends else StopReason.STOP,
    )


def plan(method, *demonstrations, task=TASK, alpha=1.0, step=0, **options):
    config = GuidanceConfig(method=method, expert_model="expert", **options)
    return build_strategy(config, SHAPE, RENDERER).plan(
        Occasion(
            task=task,
            guidance=Guidance(step=step, alpha=alpha, gamma=0.7),
            prompt_token_ids=RENDERER.render(task),
            demonstrations=demonstrations,
            seed=3,
        )
    )


def prompt_text(group) -> str:
    return "".join(map(chr, group.requests[0].prompt_token_ids))


@pytest.mark.parametrize(
    ("method", "alpha", "num_demonstrations", "sizes"),
    [
        ("mentor", 1.0, 0, [8, 4]),
        ("mentor", 0.0, 0, [8]),
        ("on_policy", 1.0, 0, [8]),
        ("luffy", 1.0, 1, [7]),
        ("luffy", 0.0, 1, [7]),
        ("luffy", 1.0, 0, [8]),
        ("questa", 1.0, 1, [8]),
        ("questa", 1.0, 0, [8]),
    ],
)
def test_requests_of_each_method(method, alpha, num_demonstrations, sizes):
    found = [demonstration(number=number) for number in range(num_demonstrations)]
    group = plan(GuidanceMethod(method), *found, alpha=alpha)
    assert group.method == method
    assert [request.num_samples for request in group.requests] == sizes
    assert [request.mixed for request in group.requests] == [False, True][: len(sizes)]
    assert group.task == TASK
    assert group.requests[0].seed == derive_seed(3, "on_policy")


def test_what_a_luffy_group_joins():
    found = [demonstration(number=number) for number in range(3)]
    group = plan(GuidanceMethod.LUFFY, *found, num_expert=2)
    assert [one.demonstration_id for one in group.demonstrations] == [
        "demonstration 0",
        "demonstration 1",
    ]
    assert (group.requests[0].num_samples, group.expert_model, group.hint) == (6, "expert", None)
    assert prompt_text(group) == "1+1?\n"


@pytest.mark.parametrize(("num_expert", "is_fine"), [(1, True), (6, True), (7, False), (0, False)])
def test_two_places_stay_the_policys(num_expert, is_fine):
    config = GuidanceConfig(method=GuidanceMethod.LUFFY, num_expert=num_expert)
    if is_fine:
        assert build_strategy(config, SHAPE, RENDERER).num_demonstrations == num_expert
        return
    with pytest.raises(ConfigError, match="expected 1 to 6"):
        build_strategy(config, SHAPE, RENDERER)


@pytest.mark.parametrize(
    ("text", "fraction", "shown", "num_tokens"),
    [
        ("abcdefgh", 0.5, "abcd", 4),
        ("abcdefgh", 0.25, "ab", 2),
        ("abcdefghi", 0.5, "abcd", 4),
        # The opening tag counts as tokens of the solution, but is not shown.
        ("<think>abcdefghi", 0.5, "a", 8),
        ("</think>abcdefgh", 0.5, "</think>", 8),
    ],
)
def test_a_hint_is_cut_by_tokens_without_the_end_token(text, fraction, shown, num_tokens):
    group = plan(GuidanceMethod.QUESTA, demonstration(text), hints=HintSchedule(fraction=fraction))
    assert prompt_text(group) == f"1+1?\n\n{HEADER}\n\n{shown}\n"
    assert group.hint is not None
    assert (group.hint.num_tokens, group.hint.fraction) == (num_tokens, fraction)
    assert group.hint.demonstration_id == "demonstration 0"
    assert group.demonstrations == ()


def test_a_last_token_that_is_no_end_token_counts():
    group = plan(GuidanceMethod.QUESTA, demonstration("abcd", ends=False))
    assert prompt_text(group).endswith("\n\nab\n")


@pytest.mark.parametrize("text", ["", "a", "<think>1234567", "    abcd"])
def test_an_empty_hint_is_none(text):
    group = plan(GuidanceMethod.QUESTA, demonstration(text))
    assert (group.hint, prompt_text(group)) == (None, "1+1?\n")


def test_a_character_cut_in_two_is_left_out():
    group = plan(GuidanceMethod.QUESTA, demonstration("ab\N{REPLACEMENT CHARACTER}def"))
    assert prompt_text(group).endswith("\n\nab\n")


@pytest.mark.parametrize(("most", "is_hinted"), [(40, True), (39, False)])
def test_a_hint_has_to_leave_room(most, is_hinted):
    text = f"1+1?\n\n{HEADER}\n\nabcd\n"
    most = most + len(text) - 40
    hints = HintSchedule(max_prompt_tokens=most)
    group = plan(GuidanceMethod.QUESTA, demonstration("abcdefgh"), hints=hints)
    assert (group.hint is not None) == is_hinted
    assert prompt_text(group) == (text if is_hinted else "1+1?\n")


def test_hints_become_shorter_at_a_step():
    hints = HintSchedule(later_step=10)
    fractions = {
        step: plan(GuidanceMethod.QUESTA, demonstration("a" * 40), step=step, hints=hints).hint
        for step in (0, 9, 10, 200)
    }
    assert [hint and hint.fraction for hint in fractions.values()] == [0.5, 0.5, 0.25, 0.25]
    assert HintSchedule(later_step=0).at(10**6) == 0.5


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.0}, {"later_fraction": 2.0}])
def test_a_share_out_of_range_is_refused(options):
    with pytest.raises(ConfigError, match="expected a share between 0 and 1"):
        HintSchedule(**options)


def test_a_hint_joins_the_last_message_of_the_user():
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "begun"},
    ]
    task = Task(source="test", prompt="?", answer="2", metadata={"messages": messages})
    group = plan(GuidanceMethod.QUESTA, demonstration("abcd"), task=task)
    assert prompt_text(group) == f"first\n\nanswer\n\nsecond\n\n{HEADER}\n\nab\n\nbegun\n"
    assert messages[2]["content"] == "second"


def test_a_conversation_without_text_of_a_user_cannot_be_hinted():
    task = Task(
        source="test",
        prompt="?",
        answer="2",
        metadata={"messages": [{"role": "system", "content": "x"}]},
    )
    with pytest.raises(ConfigError, match=r"expected a user's message.*\['system'\]"):
        plan(GuidanceMethod.QUESTA, demonstration("abcd"), task=task)
    assert plan(GuidanceMethod.LUFFY, demonstration("abcd"), task=task).demonstrations
