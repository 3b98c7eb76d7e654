"""Leased and stored groups for the learner's tests, and fakes of what surrounds it."""

import numpy as np
import torch
from sqlalchemy import create_engine, text
from transformers import LlamaConfig, LlamaForCausalLM

from mentor_serve.errors import WeightsError
from mentor_serve.learner import (
    Learner,
    LearnerConfig,
    TorchBackend,
    TrainingOptions,
    UpdateConfig,
    mixed_grpo_update,
)
from mentor_serve.store import (
    LeasedGroup,
    LeasedTrajectory,
    NewGroup,
    NewTrajectory,
    new_id,
)
from mentor_serve.types import (
    Guidance,
    Rollout,
    Score,
    StopReason,
    Task,
    TokenSource,
    TrajectoryKind,
)
from mentor_serve.weights import PublishReport

VOCAB = 13


def tiny_model(seed=0, **overrides):
    """A random Llama of a few thousand parameters with a tied head."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    } | overrides
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**values))


def reference_logprobs(model, prompt, response, temperature=1.0):
    """log pi of the response tokens, one sequence at a time, without packing: [T]."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]


def leased(
    token_ids, *, kind="on_policy", reward=0.0, logprobs=None, prompt=(1, 2, 3), index=0, **more
):
    """One leased trajectory."""
    count = len(token_ids)
    zeros = np.zeros(count, np.float32)
    old = zeros - 2.5 if logprobs is None else np.asarray(logprobs, np.float32)
    arrays = {
        "entropies": zeros + 1,
        "weights": zeros,
        "sources": np.zeros(count, np.uint8),
        "stop_reason": StopReason.EOS,
    } | more
    return LeasedTrajectory(
        trajectory_id=f"{kind}-{index}",
        kind=TrajectoryKind(kind),
        sample_index=index,
        reward=reward,
        accuracy=float(reward > 0),
        format_score=1.0,
        prompt_token_ids=np.asarray(prompt, np.int32),
        token_ids=np.asarray(token_ids, np.int32),
        policy_logprobs=old,
        expert_logprobs=zeros,
        mixed_logprobs=zeros,
        versions=np.zeros(count, np.int32),
        **arrays,
    )


def leased_group(trajectories, *, number=0, prompt=(1, 2, 3), min_policy_version=0):
    """One leased group."""
    return LeasedGroup(
        group_id=f"group-{number}",
        task_id="task",
        policy_version=min_policy_version,
        min_policy_version=min_policy_version,
        gamma=1.0,
        alpha=1.0,
        prompt_token_ids=np.asarray(prompt, np.int32),
        trajectories=trajectories,
    )


def random_groups(model, count=4, *, num_on_policy=4, num_mixed=2, seed=0, noise=0.3):
    """Groups of ragged random responses whose old log-probabilities lie near the model's."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 9)).tolist()
        items = []
        for index in range(num_on_policy + num_mixed):
            tokens = rng.integers(0, VOCAB, rng.integers(1, 12)).tolist()
            with torch.no_grad():
                exact = reference_logprobs(model, prompt, tokens).numpy()
            is_mixed = index >= num_on_policy
            items.append(
                leased(
                    tokens,
                    kind="mixed" if is_mixed else "on_policy",
                    reward=float(rng.integers(0, 2)),
                    logprobs=exact + rng.normal(0, noise, len(tokens)),
                    prompt=prompt,
                    index=index,
                )
            )
        groups.append(leased_group(items, number=number, prompt=prompt))
    return groups


def parameter_change(model, batch, **config):
    """One plain gradient step of size 1: gradients by parameter name, and the metrics."""
    values = {"mini_batch_prompts": 99, "max_grad_norm": 1e9} | config
    before = {name: item.detach().clone() for name, item in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = mixed_grpo_update(model, batch, UpdateConfig(**values), optimizer=optimizer)
    after = {name: item.detach() for name, item in model.named_parameters()}
    return {name: before[name] - after[name] for name in before}, metrics


def stored_group(seed, *, version=0, poisoned=False):
    """A group as a collector stores it; `poisoned` token ids make the model raise."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, VOCAB, 4).tolist()
    trajectories = []
    for index in range(6):
        is_mixed = index >= 4
        count = int(rng.integers(2, 8))
        tokens = rng.integers(0, VOCAB, count).astype(np.int32)
        looked = np.full(count, np.nan, np.float32)
        rollout = Rollout(
            token_ids=tokens + 1000 if poisoned else tokens,
            policy_logprobs=rng.normal(-2.5, 0.3, count).astype(np.float32),
            mixed_logprobs=looked,
            expert_logprobs=looked,
            entropies=rng.uniform(0, 2.5, count).astype(np.float32),
            weights=np.full(count, 0.5 if is_mixed else 0.0, np.float32),
            sources=np.full(count, TokenSource.POLICY, np.uint8),
            policy_versions=np.full(count, version, np.int32),
            stop_reason=StopReason.EOS,
            text="text",
        )
        reward = float(index % 2)
        trajectories.append(
            NewTrajectory(
                rollout=rollout,
                kind=TrajectoryKind.MIXED if is_mixed else TrajectoryKind.ON_POLICY,
                sample_index=index - 4 if is_mixed else index,
                score=Score(reward=reward, accuracy=reward, format_score=1.0),
                prompt_token_ids=prompt,
            )
        )
    return NewGroup(
        group_id=new_id(),
        task=Task(source="test", prompt=f"question {seed}", answer="1"),
        guidance=Guidance(policy_version=version, step=version, alpha=1.0, gamma=999.0),
        trajectories=trajectories,
    )


class FakeBroadcaster:
    """Remembers what was published; raises while `failure` is set."""

    def __init__(self):
        self.published = []
        self.failure = None

    def publish(self, snapshot):
        if self.failure is not None:
            raise self.failure
        assert snapshot.state_dict is not None
        self.published.append(snapshot)
        return PublishReport(version=snapshot.version, num_replicas=1)

    @property
    def versions(self):
        return [snapshot.version for snapshot in self.published]


def timed_out():
    return WeightsError("replica 0 did not answer in 60 s")


def make_learner(store, run_id, home, *, broadcaster=None, backend=None, load=tiny_model, **config):
    """A learner of two groups a step under `home`."""
    values = {
        "prompts_per_step": 2,
        "poll_interval_s": 0.01,
        "lock_timeout_s": 0.0,
        "max_backoff_s": 0.01,
        "update": UpdateConfig(mini_batch_prompts=1),
    } | config
    return Learner(
        store,
        run_id=run_id,
        load_policy=lambda: (load(), None),
        backend=backend or TorchBackend(TrainingOptions(learning_rate=1e-2)),
        broadcaster=broadcaster or FakeBroadcaster(),
        config=LearnerConfig(**values),
        weights_dir=home / "weights",
        checkpoints_dir=home / "checkpoints",
    )


def consumed_steps(url):
    """group id -> the step that consumed it (None: not consumed), straight from the database."""
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, status, consumed_by_step FROM rollout_groups"))
        found = {row.id: (row.status, row.consumed_by_step) for row in rows}
    engine.dispose()
    return found
