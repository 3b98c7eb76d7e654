"""Fine-tuning on given responses: what the loss covers, and that it falls."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from apps.supervised import Example, FinetuningPlan, finetune, mean_loss, response_loss
from mentor_serve.errors import ConfigError
from mentor_serve.learner.logprobs import ResponseScorer

EXAMPLES = [
    Example(prompt_token_ids=[4, 5, 6], token_ids=[7, 8, 1]),
    Example(prompt_token_ids=[9, 10], token_ids=[11, 12, 13, 14, 1]),
]


def draws(seed):
    """Counting on from the prompt's last token, which is easy to learn."""
    generator = random.Random(seed)
    while True:
        start = generator.randrange(4, 24)
        yield Example(prompt_token_ids=[2, start], token_ids=[start + 1, start + 2, start + 3, 1])


def transformers_loss(model, examples):
    """The same by transformers itself: labels of -100 on prompts, one example at a time."""
    total, count = 0.0, 0
    for example in examples:
        ids = [*example.prompt_token_ids, *example.token_ids]
        labels = [-100] * len(example.prompt_token_ids) + list(example.token_ids)
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += float(loss.detach()) * len(example.token_ids)
        count += len(example.token_ids)
    return total / count


def test_the_loss_is_that_of_response_tokens_alone(tiny_llama):
    model = tiny_llama(3)
    scorer = ResponseScorer(model, temperature=1.0)
    expected = transformers_loss(model, EXAMPLES)
    loss = response_loss(scorer, EXAMPLES, model.device)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
    for batch_size in (1, 2, 5):
        mean = mean_loss(model, EXAMPLES, batch_size=batch_size)
        assert mean == pytest.approx(expected, abs=1e-5)


def test_training_learns_the_responses(tiny_llama):
    model = tiny_llama(3)
    held_out = list(itertools.islice(draws(99), 20))
    before = mean_loss(model, held_out, batch_size=8)
    plan = FinetuningPlan(num_steps=150, batch_size=16, learning_rate=1e-2)
    losses = finetune(model, draws(0).__next__, plan)
    assert len(losses) == 150
    assert all(loss > 0 for loss in losses)
    after = mean_loss(model, held_out, batch_size=8)
    assert before > 2.0
    assert after < 0.3
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_same_seed_gives_the_same_weights(tiny_llama):
    plan = FinetuningPlan(num_steps=5, batch_size=4, learning_rate=1e-3)
    models = [tiny_llama(3) for _ in range(3)]
    losses = [
        finetune(model, draws(seed).__next__, plan)
        for model, seed in zip(models, (0, 0, 1), strict=True)
    ]
    assert losses[0] == losses[1] != losses[2]
    first, second, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_half_precision_files_are_trained_in_single_precision(tiny_llama):
    model = tiny_llama(3).to(torch.bfloat16)
    plan = FinetuningPlan(num_steps=1, batch_size=2, autocast="bfloat16")
    finetune(model, draws(0).__next__, plan)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_rate_rises_then_falls_to_nothing():
    plan = FinetuningPlan(num_steps=100, learning_rate=2e-4, warmup_share=0.1)
    rates = [plan.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == rates[10] == 2e-4
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-6
    assert rates[0] > 0


def test_a_gradient_that_is_not_finite_stops_the_training(tiny_llama):
    model = tiny_llama(3)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    example = Example(prompt_token_ids=[5], token_ids=[6, 1])
    with pytest.raises(RuntimeError, match="non-finite"):
        finetune(model, lambda: example, FinetuningPlan(num_steps=1, batch_size=1))


@pytest.mark.parametrize("changes", [{"num_steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_plans_that_train_nothing_are_refused(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}: expected a number above 0"):
        FinetuningPlan(**changes)
