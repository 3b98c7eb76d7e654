"""Calls to ranks: results, errors and time limits, with actors that hold no model."""

from __future__ import annotations

import os
import time

import pytest
import ray
from ray.exceptions import RayActorError

from mentor_serve.errors import LearnerWorkerLost
from mentor_serve.learner.backends.actor_group import ActorGroup

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def actor_class():
    """An actor that does as it is told; defined here because workers cannot import this file."""

    class Echo:
        def say(self, value, suffix):
            return f"{value}{suffix}"

        def do(self, deed):
            if deed == "die":
                os._exit(1)
            if deed == "hang":
                time.sleep(600)
            if deed == "fail":
                raise KeyError("deed")
            return deed

    return ray.remote(num_cpus=0)(Echo)


@pytest.fixture
def make_group(ray_cluster):
    """Makes groups of three actors; `ended` counts how often one was ended."""
    echo, made, ended = actor_class(), [], []

    def make(call_timeout_s=60.0):
        actors = [echo.remote() for _ in range(3)]
        made.extend(actors)
        group = ActorGroup(actors, call_timeout_s=call_timeout_s, end=lambda: ended.append(1))
        group.ended = ended
        return group

    yield make
    for actor in made:
        ray.kill(actor)


def test_results_come_in_the_order_of_ranks(make_group):
    group = make_group()
    assert group.call("say", "a", "b") == ["ab"] * 3
    assert group.scatter("say", ["x", "y", "z"], "!") == ["x!", "y!", "z!"]


def test_an_error_of_the_call_is_raised_as_it_was(make_group):
    with pytest.raises(KeyError, match="deed"):
        make_group().scatter("do", ["well", "fail", "well"])


def test_an_error_is_not_held_up_by_ranks_that_hang(make_group):
    started = time.monotonic()
    with pytest.raises(KeyError, match="deed"):
        make_group().scatter("do", ["hang", "fail", "hang"])
    assert time.monotonic() - started < 50


def test_a_death_is_noticed_while_others_hang(make_group):
    with pytest.raises(LearnerWorkerLost, match="do: expected every rank"):
        make_group().scatter("do", ["hang", "hang", "die"])


def test_what_a_death_breaks_elsewhere_is_not_taken_for_the_cause(make_group):
    group = make_group()
    group.call("do", "well")
    with pytest.raises(LearnerWorkerLost, match="one is gone"):
        group.scatter("do", ["fail", "die", "fail"])


def test_a_call_that_takes_too_long_is_given_up(make_group):
    group = make_group()
    group.call("do", "well")
    slow = ActorGroup(group.actors, call_timeout_s=1.0, end=lambda: None)
    with pytest.raises(LearnerWorkerLost, match=r"3 ranks to answer within 1 s, 1 did not"):
        slow.scatter("do", ["well", "hang", "well"])


def test_killed_ranks_are_ended_once(make_group):
    group = make_group()
    # Ray kills in the background: a short call made after it may still be answered.
    hanging = [actor.do.remote("hang") for actor in group.actors]
    group.kill()
    assert group.ended == [1]
    for ref in hanging:
        with pytest.raises(RayActorError):
            ray.get(ref, timeout=60)
    with pytest.raises(LearnerWorkerLost):
        group.call("do", "well")
