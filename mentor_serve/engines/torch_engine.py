"""`TorchEngine`: continuous batching and exact mixed sampling for any Hugging Face causal LM.

One decode step drafts a token for every running rollout (one policy pass), settles the rollouts
whose coin asked for the expert, and commits tokens, records and stops. The prompt's keys and
values are computed once for all rollouts of a prompt that share weights; the last prompt token is
read by the first decode step, so that the first generated token is drawn like every other.

The engine takes a model that it is given over: it sets eval mode and `load_weights` writes into
the model's own parameters. It refuses models without full attention (see `slot_model`).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentor_serve.engines.assembly import (
    ModelSource,
    check_vocabulary,
    context_length,
    eos_table,
    model_of,
    tokenizer_of,
)
from mentor_serve.engines.base import EngineStats, ExpertClient, StepOutput
from mentor_serve.engines.batch import RECORDED, Batch, Row, Stream
from mentor_serve.engines.expert import ExpertModel
from mentor_serve.engines.mixing import Draft, Settled, settle
from mentor_serve.engines.sampler import distribution, draw, truncated
from mentor_serve.engines.scheduler import EngineLimits, Job, Scheduler, check_request
from mentor_serve.engines.slot_model import SlotModel
from mentor_serve.engines.stopping import ends_at_stop, response_text
from mentor_serve.engines.weight_swap import check_weights, copy_weights
from mentor_serve.errors import ConfigError, EngineError, ExpertUnavailable, VocabularyMismatch
from mentor_serve.types import Rollout, RolloutRequest, StopReason


class TorchEngine:
    """A policy, and optionally an expert beside it, that generate (`engines.base.Engine`).

    Args:
        policy: model or its name.
        expert: model, its name, an `ExpertClient` (remote), or None.
        tokenizer: tokenizer or its name; None takes the policy's where the policy is a name.
            Without one, `Rollout.text` is None and stop strings are refused.
        device: where models given by name are put; a model object stays where it is.
        dtype: of models given by name.
        max_batch_size: rollouts that decode at the same time.
        max_model_len: prompt plus response; None takes the model's own, at most 4096.
        eos_token_ids: tokens that end a rollout; None takes what model and tokenizer name.

    Raises:
        ConfigError: a model cannot be loaded, or the vocabularies differ.
        EngineError: a model whose attention does not fit key-value slots.
    """

    def __init__(
        self,
        policy: ModelSource,
        expert: ModelSource | ExpertClient | None = None,
        tokenizer: Any = None,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        max_batch_size: int = 64,
        max_model_len: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size: expected at least 1, got {max_batch_size}")
        model = model_of(policy, device=device, dtype=dtype)
        self._tokenizer = tokenizer_of(policy, tokenizer)
        self._max_model_len = context_length(model, max_model_len)
        self._max_batch_size = max_batch_size
        self._policy = SlotModel(model, max_slots=max_batch_size, max_tokens=self._max_model_len)
        self._device = self._policy.device
        self._expert: ExpertModel | ExpertClient | None = expert
        if expert is not None and not hasattr(expert, "advise"):
            check_vocabulary(policy, expert)
            self._expert = self._beside(model_of(expert, device=device, dtype=dtype))
        self._is_eos = eos_table(
            model, self._tokenizer, eos_token_ids, vocab_size=self._policy.vocab_size
        )
        self._scheduler = Scheduler()
        self._batch = Batch(max_batch_size)
        self._jobs: dict[int, Job] = {}
        self._cancelled: list[int] = []
        self._next_request_id = 0
        # Unique among engines, because several may share one remote expert.
        self._next_sequence_id = secrets.randbits(30) << 32
        self._stats = EngineStats()
        self._version = 0
        self._step_lock = threading.Lock()
        self._weights_lock = threading.Lock()
        self._pending_weights: tuple[dict[str, Tensor], int] | None = None

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next decode step uses."""
        pending = self._pending_weights
        return self._version if pending is None else pending[1]

    @property
    def stats(self) -> EngineStats:
        """Live counters."""
        return self._stats

    @property
    def max_model_len(self) -> int:
        """Largest prompt plus response, in tokens."""
        return self._max_model_len

    @property
    def has_expert(self) -> bool:
        """Mixed requests can be served."""
        return self._expert is not None

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, or None."""
        return self._tokenizer

    @property
    def policy_model(self) -> Any:
        """The model that generates; between steps its parameters are those of `policy_version`."""
        return self._policy.model

    @property
    def num_running(self) -> int:
        """Rollouts that hold a slot."""
        return self._batch.num_rows

    @property
    def num_waiting(self) -> int:
        """Rollouts that wait for a slot."""
        return len(self._scheduler)

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Rollout]]:
        """Run requests to their end: one list per request with `num_samples` rollouts each.

        Raises:
            InvalidRequest: one of the requests could never be served; none was started.
            EngineError: submitted requests are unfinished; their outputs would be lost.
        """
        if self.has_unfinished():
            raise EngineError("generate: expected an idle engine; use submit and step, or wait")
        for request in requests:
            check_request(request, self._limits())
        ids = [self.submit(request) for request in requests]
        done: dict[int, dict[int, Rollout]] = {request_id: {} for request_id in ids}
        while self.has_unfinished():
            for output in self.step():
                if output.finished is not None:
                    done[output.request_id][output.sample_index] = output.finished
        return [[done[request_id][i] for i in sorted(done[request_id])] for request_id in ids]

    def submit(self, request: RolloutRequest) -> int:
        """Queue a request and return its id. Raises `InvalidRequest` if it can never be served."""
        check_request(request, self._limits())
        request_id = self._next_request_id
        self._next_request_id += 1
        prompt = tuple(int(token) for token in request.prompt_token_ids)
        room = self._max_model_len - len(prompt)
        job = Job(
            request_id=request_id,
            request=request,
            prompt=prompt,
            max_new_tokens=min(request.sampling.max_new_tokens, room),
        )
        self._jobs[request_id] = job
        self._scheduler.add(job)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request in the next step; finished or unknown ones are left alone."""
        if request_id in self._jobs and request_id not in self._cancelled:
            self._cancelled.append(request_id)

    def has_unfinished(self) -> bool:
        """Some submitted rollout has not been handed back."""
        return bool(self._jobs)

    def load_weights(self, state_dict: Mapping[str, Tensor], *, version: int) -> None:
        """Replace the policy's weights between two decode steps; running rollouts go on.

        Running rollouts keep the keys and values of the old weights. Thread-safe: during a step
        the weights are copied and wait for the next one. Tied weights may be given once.

        Raises:
            WeightsError: a name or shape does not fit; the old weights stay.
        """
        check_weights(self._policy.model, state_dict)
        with self._weights_lock:
            if self._step_lock.acquire(blocking=False):
                try:
                    self._pending_weights = None
                    self._swap(state_dict, version)
                finally:
                    self._step_lock.release()
                return
            copies = {name: value.detach().clone() for name, value in state_dict.items()}
            self._pending_weights = (copies, version)

    def step(self) -> list[StepOutput]:
        """Admit what fits, then advance every running rollout by one token."""
        with self._step_lock, torch.inference_mode():
            self._apply_pending_weights()
            outputs = self._end_cancelled()
            self._admit()
            if self._batch.num_rows:
                draft = self._draft()
                settled = settle(draft, self._batch, self._expert)
                outputs += self._commit(draft, settled)
            return outputs

    def _apply_pending_weights(self) -> None:
        with self._weights_lock:
            pending, self._pending_weights = self._pending_weights, None
            if pending is not None:
                self._swap(*pending)

    def _swap(self, state_dict: Mapping[str, Tensor], version: int) -> None:
        copy_weights(self._policy.model, state_dict)
        self._version = version
        self._stats.weight_swaps += 1

    def _end_cancelled(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for request_id in self._cancelled:
            for job, sample in self._scheduler.withdraw(request_id):
                outputs.append(self._withdrawn(job, sample))
            rows = enumerate(self._batch.rows)
            slots = [slot for slot, row in rows if row.job.request_id == request_id]
            outputs += self._end(dict.fromkeys(slots, StopReason.CANCELLED))
        self._cancelled.clear()
        return outputs

    def _admit(self) -> None:
        admitted = self._scheduler.admit(self._max_batch_size - self._batch.num_rows)
        if not admitted:
            return
        readers: dict[tuple[int, ...], int] = {
            row.job.prompt: slot
            for slot, row in enumerate(self._batch.rows)
            if row.prefill_version == self._version
        }
        to_read: list[int] = []
        to_copy: dict[int, list[int]] = {}
        for job, sample in admitted:
            slot = self._batch.add(self._row(job, sample))
            needs_scores = job.request.prompt_logprobs and job.prompt_logprobs is None
            if needs_scores:
                self._score_prompt(slot, job)
            elif job.prompt in readers:
                to_copy.setdefault(readers[job.prompt], []).append(slot)
            elif len(job.prompt) > 1:
                to_read.append(slot)
            readers.setdefault(job.prompt, slot)
        if to_read:
            prompts = [self._batch.rows[slot].job.prompt[:-1] for slot in to_read]
            self._policy.extend(to_read, prompts)
            self._stats.prefill_tokens += sum(len(prompt) for prompt in prompts)
        for source, slots in to_copy.items():
            count = len(self._batch.rows[source].job.prompt) - 1
            self._policy.copy(source, slots, num_tokens=count)
            self._stats.shared_prefill_tokens += count * len(slots)

    def _row(self, job: Job, sample: int) -> Row:
        self._next_sequence_id += 1
        return Row(
            job=job,
            sample_index=sample,
            sequence_id=self._next_sequence_id,
            prefill_version=self._version,
        )

    def _score_prompt(self, slot: int, job: Job) -> None:
        """Prefill one prompt and record the log-probability of each of its tokens."""
        logprobs = np.full(len(job.prompt), np.nan, np.float32)
        temperature = torch.tensor([self._batch.temperature[slot]], device=self._device)
        num_top = job.request.sampling.top_logprobs
        tops: list[list[tuple[int, float]]] = [[]]
        at = 1
        for logits in self._policy.score(slot, job.prompt[:-1]):
            count = len(logits)
            read = torch.tensor(job.prompt[at : at + count], device=logits.device).unsqueeze(-1)
            policy = distribution(logits, temperature.expand(count))
            logprobs[at : at + count] = policy.logprobs.gather(-1, read).squeeze(-1).cpu().numpy()
            best = policy.logprobs.topk(num_top)
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tops += [list(zip(ids, values, strict=True)) for ids, values in rows]
            at += count
        job.prompt_logprobs = logprobs
        job.prompt_top_logprobs = tops if num_top else None
        self._stats.prefill_tokens += len(job.prompt) - 1

    def _draft(self) -> Draft:
        batch, n = self._batch, self._batch.num_rows
        positions = batch.prompt_len[:n] - 1 + batch.num_new[:n]
        logits = self._policy.decode(
            self._on_device(batch.last_token[:n]), self._on_device(positions)
        )
        policy = distribution(logits, self._on_device(batch.temperature[:n]))
        drawn = self._on_device(batch.uniforms())
        masses = policy.probs
        cut = np.flatnonzero((batch.top_p[:n] < 1) | (batch.top_k[:n] > 0))
        if len(cut):
            rows = self._on_device(cut)
            top_p, top_k = self._on_device(batch.top_p[cut]), self._on_device(batch.top_k[cut])
            masses = masses.clone()
            masses[rows] = truncated(masses[rows], top_p=top_p, top_k=top_k)
        token_ids = draw(masses, drawn[:, Stream.TOKEN])
        greedy = np.flatnonzero(batch.is_greedy[:n])
        if len(greedy):
            rows = self._on_device(greedy)
            token_ids[rows] = logits[rows].argmax(dim=-1)
        self._stats.policy_steps += 1
        return Draft(
            token_ids=token_ids, policy=policy, entropies=policy.entropies(), uniforms=drawn
        )

    def _commit(self, draft: Draft, settled: Settled) -> list[StepOutput]:
        batch, n = self._batch, self._batch.num_rows
        emitted = settled.token_ids.unsqueeze(-1)
        values: dict[str, NDArray[Any]] = {
            "token_ids": settled.token_ids.cpu().numpy(),
            "policy_logprobs": draft.policy.logprobs.gather(-1, emitted)[:, 0].cpu().numpy(),
            "mixed_logprobs": settled.mixed_logprobs.cpu().numpy(),
            "expert_logprobs": settled.expert_logprobs.cpu().numpy(),
            "entropies": draft.entropies.cpu().numpy(),
            "weights": settled.weights.cpu().numpy(),
            "sources": settled.sources.cpu().numpy(),
            "policy_versions": np.full(n, self._version, np.int32),
        }
        self._note_rows(draft, settled)
        batch.record(values)
        self._stats.policy_tokens += n
        self._stats.gated_tokens += int(np.count_nonzero(values["sources"]))
        self._stats.interventions += len(settled.interventions)
        self._stats.expert_calls += settled.num_expert_calls
        self._stats.expert_tokens += settled.num_expert_tokens
        tokens: list[int] = values["token_ids"].tolist()
        counts: list[int] = batch.num_new[:n].tolist()
        outputs = [
            StepOutput(
                request_id=row.job.request_id,
                sample_index=row.sample_index,
                num_tokens=count,
                new_token_ids=[token],
            )
            for row, token, count in zip(batch.rows, tokens, counts, strict=True)
        ]
        ends = self._ends()
        for slot, ended in zip(ends, self._end(ends), strict=True):
            outputs[slot].finished = ended.finished
        return outputs

    def _note_rows(self, draft: Draft, settled: Settled) -> None:
        """Keep what is not an array: interventions, lost experts, top log-probabilities."""
        batch, n = self._batch, self._batch.num_rows
        for slot, intervention in settled.interventions.items():
            batch.rows[slot].interventions.append(intervention)
        for slot in settled.lost_rows:
            batch.rows[slot].expert_lost = True
            batch.is_mixed[slot] = False
        wanted = np.flatnonzero(batch.num_top_logprobs[:n])
        if len(wanted):
            most = int(batch.num_top_logprobs[wanted].max())
            top = draft.policy.logprobs[self._on_device(wanted)].topk(most, dim=-1)
            for slot, ids, logprobs in zip(
                wanted.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
            ):
                pairs = list(zip(ids, logprobs, strict=True))
                batch.rows[slot].top_logprobs.append(pairs[: batch.num_top_logprobs[slot]])

    def _ends(self) -> dict[int, StopReason]:
        """Which slots end with the token just recorded, and why."""
        batch, n = self._batch, self._batch.num_rows
        at_eos = self._is_eos[batch.last_token[:n]] & batch.ends_at_eos[:n]
        at_limit = batch.num_new[:n] >= batch.limit[:n]
        ends = dict.fromkeys(np.flatnonzero(at_eos).tolist(), StopReason.EOS)
        for slot in np.flatnonzero(batch.has_stops[:n] & ~at_eos).tolist():
            sampling = batch.rows[slot].job.request.sampling
            if ends_at_stop(batch.response(slot), sampling, self._tokenizer):
                ends[slot] = StopReason.STOP
        for slot in np.flatnonzero(at_limit).tolist():
            ends.setdefault(slot, StopReason.LENGTH)
        return ends

    def _end(self, ends: Mapping[int, StopReason]) -> list[StepOutput]:
        """Hand back rollouts and free their slots; one output a slot, in the order given."""
        if not ends:
            return []
        batch = self._batch
        outputs = []
        for slot, reason in ends.items():
            row, recorded = batch.rows[slot], batch.recorded(slot)
            outputs.append(self._output(row, recorded, reason))
        guided = [batch.rows[slot] for slot in ends if batch.rows[slot].job.request.mixed]
        for slot in ends:
            self._policy.truncate(slot, 0)
        if isinstance(self._expert, ExpertModel):
            self._expert.free(list(ends))
        elif self._expert is not None and guided:
            # An expert that is gone has nothing left to forget.
            with contextlib.suppress(ExpertUnavailable):
                self._expert.release([row.sequence_id for row in guided])
        sources, targets = batch.remove(list(ends))
        self._policy.move(sources, targets)
        if isinstance(self._expert, ExpertModel):
            self._expert.move(sources, targets)
        return outputs

    def _output(self, row: Row, recorded: dict[str, Any], reason: StopReason) -> StepOutput:
        job, sampling = row.job, row.job.request.sampling
        tokens = recorded["token_ids"]
        text = None
        if self._tokenizer is not None:
            text = response_text(tokens, sampling, self._tokenizer, reason)
        rollout = Rollout(
            **recorded,
            stop_reason=reason,
            text=text,
            interventions=row.interventions,
            top_logprobs=row.top_logprobs if sampling.top_logprobs else None,
            prompt_logprobs=job.prompt_logprobs,
            prompt_top_logprobs=job.prompt_top_logprobs,
            latency_s=time.perf_counter() - job.submitted_at,
            expert_lost=row.expert_lost,
        )
        job.num_open -= 1
        if job.num_open == 0:
            del self._jobs[job.request_id]
        return StepOutput(
            request_id=job.request_id,
            sample_index=row.sample_index,
            num_tokens=len(tokens),
            finished=rollout,
        )

    def _withdrawn(self, job: Job, sample: int) -> StepOutput:
        nothing: dict[str, Any] = {name: np.zeros(0, dtype) for name, dtype in RECORDED.items()}
        return self._output(self._row(job, sample), nothing, StopReason.CANCELLED)

    def _beside(self, model: Any) -> ExpertModel:
        expert = ExpertModel(model, max_slots=self._max_batch_size, max_tokens=self._max_model_len)
        if expert.slots.vocab_size != self._policy.vocab_size:
            raise VocabularyMismatch(
                f"expected policy and expert of one vocabulary, got {self._policy.vocab_size} and "
                f"{expert.slots.vocab_size} tokens"
            )
        return expert

    def _limits(self) -> EngineLimits:
        return EngineLimits(
            vocab_size=self._policy.vocab_size,
            max_model_len=self._max_model_len,
            has_expert=self._expert is not None,
            has_tokenizer=self._tokenizer is not None,
        )

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
