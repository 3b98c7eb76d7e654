"""Measures a model of the pair on the task mix.

Contract: samples at temperature 1 without truncation of the distribution, scores as the service
does (the answer counts only inside the required format) and never trains. Numbers depend on the
seed and the torch version; `docs/reference-pair.md` holds those of the bundled pair.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import reasoning_gym
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import MAX_NEW_TOKENS, TASK_CONFIG, TASK_NAME

WORDS: Final = ("verify", "check", "okay", "wait")
"""Words whose share of responses is reported: two useful ones, two that say nothing."""

_FORMAT = re.compile(r"\s*<think>.*?</think>\s*\\boxed\{([^{}]*)\}\s*", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A question of the mix with its answer."""

    question: str
    """The user's turn."""
    answer: str
    """The right answer as reasoning-gym writes it."""
    num_terms: int
    """Length of the chain."""


@dataclass(frozen=True)
class Response:
    """One sampled response, scored."""

    text: str
    """Decoded without special tokens."""
    num_tokens: int
    """Generated tokens, the end token included."""
    entropy_sum: float
    """Sum of the token entropies, nats."""
    is_correct: bool
    """The right answer inside the required format."""
    is_well_formed: bool
    """The required format, whatever the answer."""
    is_truncated: bool
    """The limit came before the end token."""


def draw_problems(num_problems: int, seed: int) -> list[Problem]:
    """Draw problems of the mix from reasoning-gym."""
    dataset = reasoning_gym.create_dataset(TASK_NAME, size=num_problems, seed=seed, **TASK_CONFIG)
    return [
        Problem(item["question"], item["answer"], item["metadata"]["num_terms"]) for item in dataset
    ]


def score(text: str, answer: str) -> tuple[bool, bool]:
    """Return (is_correct, is_well_formed) of a response's text."""
    match = _FORMAT.fullmatch(text)
    return match is not None and match.group(1).strip() == answer, match is not None


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k; pass_at_k(4, 1, 2) == 0.5."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    num_samples: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[Response]]:
    """Return `num_samples` responses a problem, drawn in one batch from torch's global state."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for problem in problems
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output: Any = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=num_samples,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    entropies_BT = torch.stack([_entropy(logits_BV) for logits_BV in output.logits], dim=1)
    ids_BT = output.sequences[:, batch["input_ids"].shape[1] :]
    rows = [
        _response(tokenizer, ids_T, entropies_T, problems[index // num_samples].answer)
        for index, (ids_T, entropies_T) in enumerate(zip(ids_BT, entropies_BT, strict=True))
    ]
    return [rows[start : start + num_samples] for start in range(0, len(rows), num_samples)]


def _entropy(logits_BV: torch.Tensor) -> torch.Tensor:
    logprobs_BV = logits_BV.float().log_softmax(dim=-1)
    return -(logprobs_BV.exp() * logprobs_BV).sum(dim=-1)


def _response(
    tokenizer: PreTrainedTokenizerFast, ids_T: torch.Tensor, entropies_T: torch.Tensor, answer: str
) -> Response:
    token_ids: list[int] = ids_T.tolist()
    eos = tokenizer.eos_token_id
    is_truncated = eos not in token_ids
    num_tokens = len(token_ids) if is_truncated else token_ids.index(eos) + 1
    text = str(tokenizer.decode(token_ids[:num_tokens], skip_special_tokens=True))
    is_correct, is_well_formed = score(text, answer)
    entropy_sum = entropies_T[:num_tokens].sum().item()
    return Response(text, num_tokens, entropy_sum, is_correct, is_well_formed, is_truncated)


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_problems: int = 400,
    num_samples: int = 16,
    seed: int = 900_000_000,
) -> dict[str, Any]:
    """Return the model's numbers on the mix as plain JSON values."""
    torch.manual_seed(seed)
    problems = draw_problems(num_problems, seed)
    groups: list[list[Response]] = []
    for start in range(0, num_problems, 25):
        part = problems[start : start + 25]
        groups += sample(model, tokenizer, part, num_samples=num_samples)
    return {
        "num_problems": num_problems,
        "num_samples": num_samples,
        **_pass_rates(groups),
        "by_num_terms": {
            str(num_terms): _pass_rates(
                [g for g, p in zip(groups, problems, strict=True) if p.num_terms == num_terms]
            )
            for num_terms in sorted({problem.num_terms for problem in problems})
        },
        **_text_numbers([response for group in groups for response in group]),
    }


def _pass_rates(groups: Sequence[Sequence[Response]]) -> dict[str, float]:
    def mean(k: int) -> float:
        rates = [pass_at_k(len(g), sum(r.is_correct for r in g), k) for g in groups]
        return round(sum(rates) / len(rates), 4)

    return {"pass@1": mean(1), "pass@8": mean(8)}


def _text_numbers(responses: Sequence[Response]) -> dict[str, Any]:
    def share(holds: Callable[[Response], bool]) -> float:
        return round(sum(map(holds, responses)) / len(responses), 4)

    num_tokens = sum(response.num_tokens for response in responses)
    return {
        "well_formed": share(lambda response: response.is_well_formed),
        "truncated": share(lambda response: response.is_truncated),
        "mean_entropy_nats": round(sum(r.entropy_sum for r in responses) / num_tokens, 4),
        "mean_num_tokens": round(num_tokens / len(responses), 1),
        "max_num_tokens": max(response.num_tokens for response in responses),
        "word_shares": {
            word: share(lambda response, word=word: word in response.text)  # type: ignore[misc]
            for word in WORDS
        },
    }


def chance_level(num_problems: int = 20_000, seed: int = 800_000_000) -> dict[str, Any]:
    """Return the best constant answer and its accuracy on the mix."""
    counts = Counter(problem.answer for problem in draw_problems(num_problems, seed))
    answer, count = counts.most_common(1)[0]
    return {"answer": answer, "accuracy": round(count / num_problems, 4)}
