"""`VllmEngine`: the engine protocol (`engines.base`) over vLLM's cores.

Requests of the policy, and mixed ones whose weight is zero beyond any doubt, run in the core of
the policy; mixed ones in the core that holds the expert. Samples wait here, by priority, until a
row is free. A row that vLLM had put out lacks a draft when it comes back, and every row does after
a weight swap: such a mixed row is submitted again from the last token it has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mentor_serve.engines.assembly import eos_table, tokenizer_of
from mentor_serve.engines.base import StepOutput
from mentor_serve.engines.queued import QueuedEngine
from mentor_serve.engines.scheduler import EngineLimits, Room
from mentor_serve.engines.vllm.cores import (
    Core,
    CoreOptions,
    Cores,
    num_priority_rows,
    start_cores,
)
from mentor_serve.engines.vllm.rows import RowSampling, StepRecords
from mentor_serve.engines.vllm.samples import Sample
from mentor_serve.engines.vllm.scores import prompt_scores
from mentor_serve.engines.weight_swap import check_weights
from mentor_serve.errors import InvalidRequest
from mentor_serve.types import Rollout, RolloutRequest, StopReason, TokenSource

_NEVER = 2.0**-53
"""A coin of this weight comes up only where its uniform, a multiple of 2**-53, is zero."""
_KEYS = itertools.count(1)
"""Names of rows, unique among the engines of a process, which may share cores."""


class VllmEngine(QueuedEngine):
    """A policy, and optionally an expert beside it, that generate (`engines.base.Engine`).

    Args:
        cores: vLLM, started; `start` does both.
        tokenizer: without one, `Rollout.text` is None and stop strings are refused.
        eos_token_ids: tokens that end a rollout; None takes what model and tokenizer name.
        max_batch_size: rollouts that run at the same time; None takes that of the cores.
        max_model_len: prompt plus response; None takes that of the cores.
    """

    def __init__(
        self,
        cores: Cores,
        *,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] | None = None,
        max_batch_size: int | None = None,
        max_model_len: int | None = None,
    ) -> None:
        max_model_len = max_model_len or cores.options.max_model_len
        vocab_size = int(cores.model.config.vocab_size)
        super().__init__(
            limits=EngineLimits(
                vocab_size=vocab_size,
                max_model_len=max_model_len,
                has_expert=cores.mixed is not None,
                has_tokenizer=tokenizer is not None,
            ),
            tokenizer=tokenizer,
        )
        self._cores = cores
        self._is_eos = eos_table(cores.model, tokenizer, eos_token_ids, vocab_size=vocab_size)
        self._room = _room(max_batch_size or cores.options.max_batch_size, max_model_len)
        self._running: dict[int, Sample] = {}
        self._version = 0
        self._num_submitted_again = 0

    @classmethod
    def start(
        cls,
        policy: str | Path,
        expert: str | Path | None = None,
        tokenizer: Any = None,
        *,
        options: CoreOptions,
        eos_token_ids: Sequence[int] | None = None,
    ) -> VllmEngine:
        """Start vLLM with models given by name, and an engine over it.

        Raises:
            ConfigError: vLLM is missing or does not fit, or a model cannot be served.
        """
        cores = start_cores(policy, expert, options)
        tokenizer = tokenizer_of(policy, tokenizer)
        return cls(cores, tokenizer=tokenizer, eos_token_ids=eos_token_ids)

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next decode step uses."""
        return self._version

    @property
    def num_submitted_again(self) -> int:
        """How often a mixed row was begun anew from the tokens it had."""
        return self._num_submitted_again

    def load_weights(self, state_dict: Mapping[str, Tensor], *, version: int) -> None:
        """Replace the policy's weights between two decode steps; running rollouts go on.

        What they have so far is read again by the new weights, so that later log-probabilities are
        those of a fresh pass. Thread-safe; waits for a step that is under way. Tied weights may be
        given once.

        Raises:
            WeightsError: a name or shape does not fit; the old weights stay.
        """
        check_weights(self._cores.model, state_dict)
        with self._step_lock:
            self._cores.policy.load_policy(state_dict, version)
            core = self._cores.mixed
            if core is not None:
                mixed = [sample for sample in self._running.values() if sample.core is core]
                core.abort([sample.key for sample in mixed])
                core.load_policy(state_dict, version)
                for sample in mixed:
                    self._submit_again(sample)
            self._version = version
            self._stats.weight_swaps += 1

    def step(self) -> list[StepOutput]:
        """Admit what fits, then do one step of each core that has work (`Engine.step`)."""
        with self._step_lock:
            outputs = self._end_cancelled()
            self._admit()
            for core in (self._cores.policy, self._cores.mixed):
                if core is not None and core.has_unfinished():
                    outputs += self._advance(core)
            return outputs

    def close(self) -> None:
        """Shut vLLM down; the engine cannot be used any more."""
        for core in (self._cores.policy, self._cores.mixed):
            if core is not None:
                core.close()

    def _check(self, request: RolloutRequest) -> None:
        super()._check(request)
        if request.prompt_logprobs and request.sampling.temperature not in (0.0, 1.0):
            raise InvalidRequest(
                "prompt_logprobs: the vLLM engine scores prompts at temperature 1 only, got "
                f"{request.sampling.temperature:g}; leave prompt_logprobs out, or use temperature 1"
            )
        if self._core(request) is self._cores.policy:
            return
        if len(request.prompt_token_ids) < 2:
            raise InvalidRequest(
                "mixed: the vLLM engine needs a prompt of at least 2 tokens, got 1; begin the "
                "prompt with the model's start token"
            )
        if request.constant_weight is not None or request.first_weight is not None:
            raise InvalidRequest(
                "mixed: the vLLM engine gates by entropy alone; leave constant_weight and "
                'first_weight out, or use policy.engine = "torch"'
            )
        if request.prompt_logprobs:
            raise InvalidRequest(
                "mixed: the vLLM engine scores prompts of the policy's own requests only; send "
                "prompt_logprobs with mixed=False"
            )

    def _core(self, request: RolloutRequest) -> Core:
        """The expert's where the weight can exceed `_NEVER`: the entropy is at most log V."""
        asks = request.record_mixed or request.gamma * _NEVER < math.log(self._limits.vocab_size)
        mixed = self._cores.mixed
        return mixed if request.mixed and asks and mixed is not None else self._cores.policy

    def _admit(self) -> None:
        admitted = self._scheduler.admit(self._room, num_rows=len(self._running), longest=0)
        for job, index in admitted:
            sample = Sample(
                job=job,
                sample_index=index,
                key=next(_KEYS),
                core=self._core(job.request),
            )
            self._running[sample.key] = sample
            self._stats.prefill_tokens += len(job.prompt)
            self._add(sample)

    def _add(self, sample: Sample) -> None:
        """Give a sample to its core, from the last token that it has."""
        job, request = sample.job, sample.job.request
        prompt = [*job.prompt, *sample.token_ids]
        left = job.max_new_tokens - len(sample.token_ids)
        if sample.core is self._cores.policy:
            # Each sample scores the prompt itself: one that waited for another's scores could end
            # before them.
            scores = request.prompt_logprobs and job.prompt_logprobs is None
            sample.core.add(
                RowSampling.of(request, key=sample.key, sample=sample.sample_index),
                prompt,
                max_tokens=left,
                priority=request.priority,
                num_prompt_logprobs=request.sampling.top_logprobs if scores else None,
            )
            return
        *prompt, forced = prompt
        sample.core.add(
            RowSampling.of(
                request, key=sample.key, sample=sample.sample_index, forced_token=forced
            ),
            prompt,
            max_tokens=left + 1,
            priority=request.priority,
        )

    def _submit_again(self, sample: Sample) -> None:
        self._num_submitted_again += 1
        del self._running[sample.key]
        sample.key = next(_KEYS)
        self._running[sample.key] = sample
        self._add(sample)

    def _advance(self, core: Core) -> list[StepOutput]:
        records, scores = core.step()
        for key, scored in scores.items():
            if key in self._running:
                prompt_scores(scored, self._running[key].job)
        if records is None:
            return []
        self._count(core, records)
        outputs = []
        ended: list[int] = []
        for row, key in enumerate(records.keys):
            sample = self._running.get(key)
            if sample is None:
                continue
            if records.is_lost[row]:
                core.abort([key])
                self._submit_again(sample)
            elif records.counts[row]:
                outputs.append(self._extend(sample, records, row, ended))
        core.abort(ended)
        return outputs

    def _extend(
        self, sample: Sample, records: StepRecords, row: int, ended: list[int]
    ) -> StepOutput:
        added, reason = sample.extend(records, row, is_eos=self._is_eos, tokenizer=self._tokenizer)
        sources = records.records["sources"][row, : len(added)]
        self._stats.policy_tokens += len(added)
        self._stats.gated_tokens += int(np.count_nonzero(sources))
        self._stats.interventions += int(np.count_nonzero(sources == TokenSource.EXPERT))
        output = StepOutput(
            request_id=sample.job.request_id,
            sample_index=sample.sample_index,
            num_tokens=len(sample.token_ids),
            new_token_ids=added,
        )
        if reason is not None:
            ended.append(sample.key)
            output.finished = self._finish(sample, reason)
        return output

    def _count(self, core: Core, records: StepRecords) -> None:
        self._stats.policy_steps += 1
        if core is self._cores.mixed:
            settled = int(records.counts.sum())
            self._stats.expert_calls += 1
            self._stats.expert_tokens += records.num_drafted
            self._stats.rolled_back_tokens += records.num_drafted - settled

    def _end_cancelled(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for request_id in self._cancelled:
            for job, index in self._scheduler.withdraw(request_id):
                nothing = Sample(job=job, sample_index=index, key=0, core=self._cores.policy)
                outputs.append(self._cancelled_output(nothing))
            samples = [s for s in self._running.values() if s.job.request_id == request_id]
            for sample in samples:
                sample.core.abort([sample.key])
                outputs.append(self._cancelled_output(sample))
        self._cancelled.clear()
        return outputs

    def _cancelled_output(self, sample: Sample) -> StepOutput:
        return StepOutput(
            request_id=sample.job.request_id,
            sample_index=sample.sample_index,
            num_tokens=len(sample.token_ids),
            finished=self._finish(sample, StopReason.CANCELLED),
        )

    def _finish(self, sample: Sample, reason: StopReason) -> Rollout:
        self._running.pop(sample.key, None)
        return self._rollout(
            sample.job,
            sample.recorded(),
            reason,
            interventions=sample.interventions,
            top_logprobs=sample.top_logprobs,
        )


def _room(max_batch_size: int, max_model_len: int) -> Room:
    """Rows only: vLLM pages keys and values, and puts rows out where they run short."""
    num_priority = num_priority_rows(max_batch_size)
    return Room(
        num_slots=max_batch_size,
        num_priority_slots=num_priority,
        num_tokens=(max_batch_size + num_priority) * max_model_len,
    )
