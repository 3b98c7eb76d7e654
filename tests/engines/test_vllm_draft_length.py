"""How many tokens the policy drafts ahead, from verdicts that are given here; without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mentor_serve.engines.vllm.draft_length import DraftLength
from mentor_serve.engines.vllm.rows import StepRecords
from mentor_serve.errors import ConfigError
from mentor_serve.types import TokenSource

MOST = 8


def _length_after(rows, *, num_steps=200):
    """The length in force after steps whose rows settle so many tokens; negative: and replace."""
    scheduler = SimpleNamespace(dynamic_sd_lookup=[0, *[MOST] * 4])
    length = DraftLength(scheduler, most=MOST)
    records = StepRecords.empty(list(range(len(rows))), MOST + 1)
    for row, settled in enumerate(rows):
        records.counts[row] = abs(settled)
        if settled < 0:
            records.records["sources"][row, abs(settled) - 1] = TokenSource.EXPERT
    for _ in range(num_steps):
        length.adapt(records)
    assert set(scheduler.dynamic_sd_lookup) == {length.num_tokens}
    return length.num_tokens


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([MOST], MOST),
        ([-1, -1], 1),
        ([1, -1, -1], 1),
        # 8 of 10 stand: the fourth is reached with probability 0.51, the fifth with 0.41.
        ([8, -1, -1], 4),
        # 3 of 5 stand: the second is reached with probability 0.6, the third with 0.36.
        ([3, -1, -1], 2),
    ],
)
def test_tokens_are_drafted_that_are_reached_every_second_time(rows, expected):
    assert _length_after(rows) == expected


def test_one_unlucky_step_changes_little():
    assert _length_after([-1], num_steps=1) >= MOST - 1


def test_steps_that_settle_nothing_say_nothing():
    scheduler = SimpleNamespace(dynamic_sd_lookup=[0, MOST])
    DraftLength(scheduler, most=MOST).adapt(StepRecords.empty([1], 1))
    assert scheduler.dynamic_sd_lookup == [0, MOST]


def test_a_scheduler_without_the_table_is_refused():
    with pytest.raises(ConfigError, match="dynamic_sd_lookup"):
        DraftLength(SimpleNamespace(dynamic_sd_lookup=None), most=MOST)
