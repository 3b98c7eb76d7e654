"""What readiness says while the policy does not answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from mentor_serve.actors import gateway, names
from mentor_serve.serving.errors import OverloadedError
from mentor_serve.settings import Settings


class SilentCollector:
    def broadcast(self, method):
        return self

    async def results_async(self, **options):
        raise TimeoutError


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (lambda: asyncio.sleep(60), "policy: loading its models, or busy: no answer within 0.01 s"),
        (
            lambda: _raising(OverloadedError("the policy replica is being replaced")),
            "policy: the policy replica is being replaced",
        ),
    ],
    ids=["silent", "replaced"],
)
def test_a_policy_that_does_not_answer_yet_is_named(monkeypatch, state, reason):
    monkeypatch.setattr(gateway, "ANSWER_TIMEOUT_S", 0.01)
    policy = SimpleNamespace(state=SimpleNamespace(remote=state))
    store = SimpleNamespace(count_groups=lambda run_id: {})

    async def ask():
        handles = {names.POLICY: policy, names.COLLECTOR: SilentCollector()}
        return await gateway.GatewayBackend(Settings(), store, "run", handles).readiness()

    readiness = asyncio.run(ask())
    assert not readiness.ready
    assert reason in readiness.reasons


async def _raising(error):
    raise error
