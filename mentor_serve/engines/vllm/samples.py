"""A running sample: what vLLM's steps added to it so far, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mentor_serve.engines.batch import RECORDED
from mentor_serve.engines.scheduler import Job
from mentor_serve.engines.stopping import ends_at_stop
from mentor_serve.engines.vllm.cores import Core
from mentor_serve.engines.vllm.rows import StepRecords
from mentor_serve.types import Intervention, StopReason, TokenSource


@dataclass(slots=True, eq=False, kw_only=True)
class Sample:
    """One sample of a request."""

    job: Job
    sample_index: int
    key: int
    """Name of its row in vLLM; another one each time it is submitted."""
    core: Core
    """Where it runs."""
    token_ids: list[int] = field(default_factory=list)
    interventions: list[Intervention] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    _chunks: list[dict[str, NDArray[Any]]] = field(default_factory=list)

    def extend(
        self, records: StepRecords, row: int, *, is_eos: NDArray[np.bool_], tokenizer: Any
    ) -> tuple[list[int], StopReason | None]:
        """Add what a step settled; returns the tokens added and why it ends, if it does."""
        start = len(self.token_ids)
        reason = None
        for token in records.records["token_ids"][row, : records.counts[row]].tolist():
            self.token_ids.append(token)
            reason = self._ending(is_eos, tokenizer)
            if reason is not None:
                break
        added = self.token_ids[start:]
        count = len(added)
        self._chunks.append(
            {name: values[row, :count].copy() for name, values in records.records.items()}
        )
        self.top_logprobs += records.top_logprobs.get(row, [])[:count]
        self._note_interventions(records, row, start, count)
        return added, reason

    def recorded(self) -> dict[str, NDArray[Any]]:
        """Everything recorded of its tokens, [T] each."""
        return {
            name: np.concatenate([np.zeros(0, dtype), *(chunk[name] for chunk in self._chunks)])
            for name, dtype in RECORDED.items()
        }

    def _ending(self, is_eos: NDArray[np.bool_], tokenizer: Any) -> StopReason | None:
        sampling = self.job.request.sampling
        if is_eos[self.token_ids[-1]] and not sampling.ignore_eos:
            return StopReason.EOS
        if sampling.stop or sampling.stop_token_ids:
            response = np.array(self.token_ids, np.int32)
            if ends_at_stop(response, sampling, tokenizer):
                return StopReason.STOP
        if len(self.token_ids) >= self.job.max_new_tokens:
            return StopReason.LENGTH
        return None

    def _note_interventions(self, records: StepRecords, row: int, start: int, count: int) -> None:
        here = {name: values[row, :count] for name, values in records.records.items()}
        for at in np.flatnonzero(here["sources"] == TokenSource.EXPERT).tolist():
            self.interventions.append(
                Intervention(
                    position=start + at,
                    proposed_token_id=int(records.proposed[row, at]),
                    chosen_token_id=int(here["token_ids"][at]),
                    entropy=float(here["entropies"][at]),
                    weight=float(here["weights"][at]),
                    policy_logprob=float(records.proposed_policy_logprobs[row, at]),
                    expert_logprob=float(records.proposed_expert_logprobs[row, at]),
                )
            )
