"""What the benchmark of token arrays counts, on a pair of tiny models."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pairs import Pair
from benchmarks.token_arrays import (
    COUNTS,
    bytes_per_token,
    collect,
    pages_per_token,
    speed,
    uncompressed_size,
)
from mentor_serve.store.encoding import encode
from mentor_serve.types import TrajectoryKind


@pytest.fixture
def groups(tiny_pair):
    policy, expert = tiny_pair
    pair = Pair(name="tiny", policy=policy, expert=expert, prompts=((5, 6, 7), (8, 9), (4, 4)))
    return collect(pair, num_tokens=40, is_full=True)


def test_groups_are_whole_and_the_first_sets_gamma(groups):
    assert len(groups) == 2
    assert all(0 < group.gamma < 10 for group in groups)
    for kind, count in COUNTS.items():
        assert groups[0].num_tokens(kind) == count * 40
    assert any(rollout.num_gated for rollout in groups[0].rollouts[TrajectoryKind.MIXED])


def test_bytes_are_those_of_the_arrays(groups):
    report = bytes_per_token(groups)
    assert set(report) == {"on_policy", "mixed", "all"}
    columns = report["mixed"]
    assert columns["total"]["after"] < columns["total"]["before"]
    entropies = [rollout.entropies for g in groups for rollout in g.rollouts[TrajectoryKind.MIXED]]
    expected = sum(len(encode(array)) for array in entropies) / (len(entropies) * 40)
    assert columns["entropies"]["after"] == pytest.approx(expected, abs=1e-3)
    assert columns["entropies"]["before"] == pytest.approx((8 + 160) / 40, abs=1e-3)


def test_before_is_raw_or_one_value():
    assert uncompressed_size(np.arange(5, dtype=np.int32)) == 8 + 20
    assert uncompressed_size(np.full(5, np.nan, np.float32)) == 8 + 4


def test_levels_are_compared_on_the_same_arrays_and_put_back(groups):
    report = speed(groups, levels=(1, 9), rounds=1)
    assert list(report) == ["1", "9"]
    total = bytes_per_token(groups)["all"]["total"]["after"]
    assert report["1"]["bytes_per_token"] == total


def test_pages_hold_the_payload_and_more(groups):
    pages = pages_per_token(groups)
    assert pages["payload"] == bytes_per_token(groups)["all"]["total"]["after"]
    assert pages["trajectory_tokens"] > pages["payload"]
