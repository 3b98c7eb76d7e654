"""Stored attempts of the expert follow pi*, and not the policy.

The seeds are fixed, so a run either always passes or never does. A correct implementation would
fail with a freshly chosen seed with probability 1e-6 (up to the chi-square approximation; cells
that expect fewer than 5 are pooled).
"""

import asyncio

import numpy as np
import pytest
import torch
from engine_scene import EXPERT, EngineScene
from scipy.stats import chisquare

from mentor_serve.rollout.demonstrations import Demonstrations, Request
from mentor_serve.rollout.pacing import Backoff
from mentor_serve.rollout.recorder import Recorder
from mentor_serve.types import Score, Task

FALSE_ALARM = 1e-6
NUM_TASKS, ATTEMPTS = 250, 8
PROMPT = [5, 14, 6]
END_TOKENS = (1, 20, 21, 22)


def probabilities(model, *, temperature=1.0):
    """[V, V] probability of each response of at most two tokens; one token ends it: [a, a]."""
    size = model.config.vocab_size
    prompts = torch.tensor([[*PROMPT, token] for token in range(size)])
    with torch.no_grad():
        logits = model(prompts).logits.double() / temperature
    first = logits[0, -2].softmax(-1)
    joint = first[:, None] * logits[:, -1].softmax(-1)
    for end in END_TOKENS:
        joint[end] = 0
        joint[end, end] = first[end]
    assert float(joint.sum()) == pytest.approx(1.0)
    return joint.numpy()


def p_value(counts, expected):
    """Of `counts` under `expected` probabilities, rare cells pooled."""
    expected = expected.ravel() * counts.sum()
    counts = counts.ravel()
    is_rare = expected < 5
    pooled = [counts[is_rare].sum(), expected[is_rare].sum()]
    observed = np.append(counts[~is_rare], pooled[0])
    wanted = np.append(expected[~is_rare], pooled[1])
    return chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.fixture
def scene(tmp_path, tiny_pair, tiny_tokenizer):
    opened = EngineScene(tmp_path, pair=tiny_pair, tokenizer=tiny_tokenizer)
    yield opened
    opened.store.close()


def stored_responses(scene, **options):
    """[V, V] counts of the stored attempts at many tasks of one prompt, none of them right."""

    async def judge(task, texts):
        return [Score(reward=0.0, accuracy=0.0, format_score=0.0) for _ in texts]

    async def run():
        recorder = Recorder(scene.store, scene.run_id, new_backoff=Backoff)
        finder = Demonstrations(
            config=scene.config(expert_attempts=ATTEMPTS, max_new_tokens=2),
            sampler=scene.sampler,
            recorder=recorder,
            renderer=scene.renderer,
            judge=judge,
        )
        for number in range(NUM_TASKS):
            task = Task(source="test", prompt="1+2", answer=str(number))
            found = await finder.find(
                Request(task=task, prompt_token_ids=PROMPT, num_wanted=ATTEMPTS, policy_version=0)
            )
            assert found.demonstrations == ()
        await recorder.close()

    asyncio.run(run())
    counts = np.zeros((32, 32), np.int64)
    for number in range(NUM_TASKS):
        task = Task(source="test", prompt="1+2", answer=str(number))
        attempts = scene.store.demonstration_attempts(
            scene.run_id, task, expert_model=EXPERT, prompt_token_ids=PROMPT
        )
        assert len(attempts) == ATTEMPTS
        for one in scene.store.demonstrations([one.demonstration_id for one in attempts]):
            counts[one.token_ids[0], one.token_ids[-1]] += 1
    return counts


def test_stored_attempts_follow_the_expert(scene, tiny_pair):
    policy, expert = tiny_pair
    counts = stored_responses(scene)
    assert counts.sum() == NUM_TASKS * ATTEMPTS
    assert p_value(counts, probabilities(expert)) > FALSE_ALARM
    # The check has the power to tell: not even a tenth of the policy would pass.
    assert p_value(counts, probabilities(policy)) < 1e-12
    blend = 0.9 * probabilities(expert) + 0.1 * probabilities(policy)
    assert p_value(counts, blend) < FALSE_ALARM
