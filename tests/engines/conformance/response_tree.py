"""pi_mix by plain transformers and numpy: next-token tables, and whole responses enumerated.

Written apart from the engine and from `core/`, so that no mistake is shared. Shapes: N prefixes,
V vocabulary, L tokens of a prompt and a response, S sources (`TokenSource`), D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mentor_serve.types import TokenSource

from .comparison import Floats, Ints

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What pi_mix depends on beside the two models."""

    gamma: float
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """The distributions of the next token after each of N prefixes."""

    policy: Floats
    """[N, V]"""
    expert: Floats
    """[N, V]"""
    entropies: Floats
    """[N] nats, of the policy."""
    weights: Floats
    """[N]"""

    @property
    def mixed(self) -> Floats:
        """pi_mix (Eq. 6), [N, V]."""
        weight = self.weights[:, None]
        return (1 - weight) * self.policy + weight * self.expert

    @property
    def sourced(self) -> Floats:
        """Probability of each source and token together, [N, S, V]; sums over S to pi_mix.

        `(1 - w) p` ungated, `w min(p, q)` gated and kept, `w (q - p)_+` replaced by the expert.
        """
        weight = self.weights[:, None]
        parts = {
            TokenSource.POLICY: (1 - weight) * self.policy,
            TokenSource.GATED_KEPT: weight * np.minimum(self.policy, self.expert),
            TokenSource.EXPERT: weight * np.clip(self.expert - self.policy, 0, None),
        }
        return np.stack([parts[source] for source in sorted(parts)], axis=1)

    @property
    def ranks(self) -> Ints:
        """Rank of each token by `q - p`, from what the expert likes least, [N, V].

        A sampler that leans to either side shows by rank, whatever the prefixes; by token id the
        errors of different prefixes may cancel.
        """
        return (self.expert - self.policy).argsort(axis=1).argsort(axis=1)

    def __getitem__(self, index: Any) -> Tables:
        return Tables(
            policy=self.policy[index],
            expert=self.expert[index],
            entropies=self.entropies[index],
            weights=self.weights[index],
        )


def tables_along(
    policy: Any, expert: Any, tokens: Sequence[Sequence[int]], gate: Gate, *, start: int
) -> Tables:
    """Tables of the tokens from offset `start` on, given what precedes each, row by row.

    [D, L] sequences of one length -> N = D * (L - start) prefixes.
    """
    p, q = (_next_probabilities(model, tokens, gate, start=start) for model in (policy, expert))
    entropies = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=-1)
    weights = np.ones_like(entropies)
    if gate.gamma > 0:
        weights = np.minimum(1.0, entropies / gate.gamma)
    return Tables(policy=p, expert=q, entropies=entropies, weights=weights)


def _next_probabilities(
    model: Any, tokens: Sequence[Sequence[int]], gate: Gate, *, start: int
) -> Floats:
    """[D, L] -> [D * (L - start), V]: what follows each of the tokens start - 1 to L - 2."""
    every_token = torch.tensor(tokens)
    parts = []
    for rows in torch.split(every_token, _ROWS_AT_ONCE):
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits[:, start - 1 :].double()
        parts.append((logits / gate.temperature).softmax(-1).flatten(0, 1))
    probabilities: Floats = torch.cat(parts).numpy()
    return probabilities


Ends = Callable[[tuple[int, ...]], bool]
"""Does a response end with its last token?"""


class ResponseTree:
    """Every response that pi_mix can give to a prompt, with its probability.

    Node 0 is the prompt. `children[node, token]` is the next node, or `-1 - leaf` where the
    response ends there; leaves are numbered as in `responses`.
    """

    def __init__(
        self,
        policy: Any,
        expert: Any,
        prompt: Sequence[int],
        gate: Gate,
        *,
        max_new_tokens: int,
        ends: Ends,
    ) -> None:
        self.responses: list[tuple[int, ...]] = []
        self.vocab_size = int(policy.config.vocab_size)
        levels: list[Tables] = []
        children: list[list[int]] = []
        prefixes: list[tuple[int, ...]] = [()]
        for length in range(1, max_new_tokens + 1):
            # A last token of any value: tables are of what follows the prefix.
            rows = [[*prompt, *prefix, 0] for prefix in prefixes]
            levels.append(tables_along(policy, expert, rows, gate, start=len(rows[0]) - 1))
            first_child = len(children) + len(prefixes)
            extended: list[tuple[int, ...]] = []
            for prefix in prefixes:
                row = []
                for token in range(self.vocab_size):
                    response = (*prefix, token)
                    if length == max_new_tokens or ends(response):
                        self.responses.append(response)
                        row.append(-len(self.responses))
                    else:
                        row.append(first_child + len(extended))
                        extended.append(response)
                children.append(row)
            prefixes = extended
        self.children: Ints = np.array(children)
        self.tables = Tables(
            policy=np.concatenate([level.policy for level in levels]),
            expert=np.concatenate([level.expert for level in levels]),
            entropies=np.concatenate([level.entropies for level in levels]),
            weights=np.concatenate([level.weights for level in levels]),
        )
        self._leaf_of = {response: leaf for leaf, response in enumerate(self.responses)}
        self.probabilities = self.leaf_probabilities(self.tables.mixed)

    def leaf_probabilities(self, next_token: Floats) -> Floats:
        """Probability of each response if the token after node i follows `next_token[i]`."""
        reach = np.zeros(len(self.children))
        reach[0] = 1.0
        leaves = np.zeros(len(self.responses))
        for node, row in enumerate(self.children):
            for token, child in enumerate(row.tolist()):
                mass = reach[node] * next_token[node, token]
                if child < 0:
                    leaves[-1 - child] = mass
                else:
                    reach[child] = mass
        return leaves

    def count(self, responses: Iterable[Sequence[int]]) -> Ints:
        """How often each response occurs.

        Raises:
            KeyError: one that can never occur: it goes on after its end, or ends too early.
        """
        leaves = np.array([self._leaf_of[tuple(response)] for response in responses])
        return np.bincount(leaves, minlength=len(self.responses))

    def steps(self, counts: Ints) -> tuple[Ints, Ints]:
        """Every next-token draw behind these responses: nodes and tokens, [draws] each."""
        nodes: list[int] = []
        tokens: list[int] = []
        for response, count in zip(self.responses, counts.tolist(), strict=True):
            node = 0
            for token in response:
                nodes += [node] * count
                tokens += [token] * count
                node = int(self.children[node, token])
        return np.array(nodes), np.array(tokens)

    def lengths(self) -> Ints:
        """Number of tokens of each response."""
        return np.array([len(response) for response in self.responses])
