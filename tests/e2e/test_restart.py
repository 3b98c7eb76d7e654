"""Stopping, a power cut, and starting again: nothing is lost and nothing is used twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from service_checks import assert_every_group_was_used_once

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]

QUESTION = "State the final answer to the following arithmetic problem: 4 - 1 - 7 ="


def test_stop_finishes_requests_in_flight_and_a_restart_goes_on(
    start_service: Callable[..., Any],
) -> None:
    first = start_service()
    first.wait_for_step(2)
    client = openai.OpenAI(base_url=f"{first.base_url}/v1", api_key="unused", max_retries=0)
    chunks: list[Any] = []

    def read_slowly() -> None:
        stream = client.completions.create(
            model="policy",
            prompt=QUESTION,
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks.extend(stream)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    first.wait_for(lambda: bool(chunks) or not reader.is_alive(), "the first chunk")
    assert first.interrupt(signal.SIGTERM) == 0, first.output.read_text()[-3000:]
    reader.join(timeout=30)
    assert chunks[-1].choices[0].finish_reason == "length"
    ((step, version),) = first.query("select max(step), max(policy_version) from updates")
    assert step >= 2

    second = start_service(home=first.home, port=first.port)
    second.wait_for_step(step)
    training = second.get("/v1/training")
    assert training["policy_version"] >= version
    second.wait_for_step(step + 2)
    second.kill_tree()

    ((killed_at,),) = second.query("select max(step) from updates")
    third = start_service(home=first.home, port=first.port)
    third.wait_for_step(killed_at + 2)
    assert third.interrupt(signal.SIGINT) == 0, third.output.read_text()[-3000:]
    assert_every_group_was_used_once(third)
    assert third.query("select count(*) from rollout_groups where status = 'leased'") == [(0,)]
