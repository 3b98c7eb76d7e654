"""gamma and the character of a pair, measured on what the policy itself writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mentor_serve.core.entropy import entropy_quantile
from mentor_serve.core.gate import guidance_weight
from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.engines.sampler import distribution
from mentor_serve.engines.slots.slot_model import SlotModel

QUANTILE = 0.95
"""p of gamma_p, as in the paper."""
_SEED = 1_000_003
_COMPARED_ROLLOUTS = 8
"""Rollouts on which the distance of policy and expert is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What mixed sampling will meet; all means are over tokens of on-policy samples."""

    gamma: float
    """0.95 quantile of the token entropies, in nats."""
    mean_entropy: float
    mean_weight: float
    """Mean of `min(1, H / gamma)`: the share of gated tokens."""
    total_variation: float
    """Mean TV(pi_theta, pi*)."""
    replacement_rate: float
    """Mean of w * TV: how often a token is replaced by the expert's."""


def calibrate(
    policy: Any,
    expert: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    new_tokens: int,
    temperature: float = 1.0,
    max_tokens: int,
) -> Calibration:
    """Sample two responses a prompt from the policy, and let the expert read the first ones."""
    engine = TorchEngine(
        policy, max_batch_size=2 * len(prompts), max_model_len=max_tokens, eos_token_ids=()
    )
    sampling = SamplingParams(temperature=temperature, max_new_tokens=new_tokens, ignore_eos=True)
    rollouts = engine.generate(
        [
            RolloutRequest(
                prompt_token_ids=prompt, num_samples=2, seed=_SEED + i, sampling=sampling
            )
            for i, prompt in enumerate(prompts)
        ]
    )
    entropies = torch.from_numpy(np.stack([r.entropies for group in rollouts for r in group]))
    gamma = entropy_quantile(entropies, QUANTILE)
    first = [(p, group[0]) for p, group in zip(prompts, rollouts, strict=True)]
    compared = first[:_COMPARED_ROLLOUTS]
    distances = _distances(
        policy, expert, [(p, r.token_ids.tolist()) for p, r in compared], temperature, max_tokens
    )
    weights = guidance_weight(torch.from_numpy(np.stack([r.entropies for _, r in compared])), gamma)
    return Calibration(
        gamma=gamma,
        mean_entropy=float(entropies.mean()),
        mean_weight=float(guidance_weight(entropies, gamma).mean()),
        total_variation=float(distances.mean()),
        replacement_rate=float((weights * distances).mean()),
    )


@torch.inference_mode()
def _distances(
    policy: Any,
    expert: Any,
    texts: Sequence[tuple[tuple[int, ...], list[int]]],
    temperature: float,
    max_tokens: int,
) -> Tensor:
    """TV(pi_theta, pi*) at every response token, teacher-forced: [texts, T]."""
    slots = [SlotModel(model, max_slots=1, max_tokens=max_tokens) for model in (policy, expert)]
    rows = []
    for prompt, response in texts:
        tokens = [*prompt, *response[:-1]]
        wanted = range(len(prompt) - 1, len(tokens))
        temperatures = torch.full((len(response),), temperature, device=slots[0].device)
        probs = []
        for model in slots:
            model.truncate(0, 0)
            probs.append(distribution(model.read([0], [tokens], [wanted]), temperatures).probs)
        rows.append(0.5 * (probs[0] - probs[1]).abs().sum(dim=-1).cpu())
    return torch.stack(rows)
