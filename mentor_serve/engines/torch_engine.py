"""`TorchEngine`: continuous batching and exact mixed sampling for any Hugging Face causal LM.

One step reads a share of the waiting prompts, asks the expert about open positions if that pays
now, drafts a token for every row that may go on (one policy pass), and hands out what is settled.
The prompt's keys and values are computed once for all rollouts of a prompt that share weights; the
last prompt token is read by the first decode step, so that the first generated token is drawn
like every other.

The engine takes a model that it is given over: it sets eval mode and `load_weights` writes into
the model's own parameters. It refuses models without full attention (see `slot_model`).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mentor_serve.engines.advisors import Advisor, ColocatedAdvisor, Decoding, RemoteAdvisor
from mentor_serve.engines.assembly import (
    ModelSource,
    check_vocabulary,
    context_length,
    eos_table,
    model_of,
    tokenizer_of,
)
from mentor_serve.engines.base import ExpertClient, StepOutput
from mentor_serve.engines.batch import RECORDED, STOP_REASONS, Batch, Ending, Row
from mentor_serve.engines.drafting import Drafter
from mentor_serve.engines.expert import ExpertModel
from mentor_serve.engines.expert_link import ExpertLink
from mentor_serve.engines.prefill import Prefill
from mentor_serve.engines.queued import QueuedEngine
from mentor_serve.engines.run_ahead import RunAhead, RunAheadLimit
from mentor_serve.engines.scheduler import EngineLimits, Job, Room
from mentor_serve.engines.slots.slot_model import SlotModel
from mentor_serve.engines.tails import Tails
from mentor_serve.engines.weight_swap import check_weights, copy_weights
from mentor_serve.errors import ConfigError, VocabularyMismatch
from mentor_serve.types import StopReason, TokenSource


class TorchEngine(QueuedEngine):
    """A policy, and optionally an expert beside it, that generate (`engines.base.Engine`).

    Args:
        policy: model or its name.
        expert: model, its name, an `ExpertClient` (remote), or None.
        tokenizer: tokenizer or its name; None takes the policy's where the policy is a name.
            Without one, `Rollout.text` is None and stop strings are refused.
        device: where models given by name are put; a model object stays where it is.
        dtype: of models given by name.
        max_batch_size: rollouts that decode at the same time; requests of a priority above 0 find
            an eighth as many further slots (at least one), so that they need not wait for these.
        max_model_len: prompt plus response; None takes the model's own, at most 4096.
        eos_token_ids: tokens that end a rollout; None takes what model and tokenizer name.
        kv_cache_gib: memory for keys and values, of policy and colocated expert together; rows wait
            for room in it.
        run_ahead: how far the policy drafts past tokens that wait for the expert: "auto" weighs
            measured costs, k runs on to k open positions a row (0 settles each at once). Changes
            speed only, never what is sampled.

    Raises:
        ConfigError: a model cannot be loaded, or the vocabularies differ.
        EngineError: a model whose attention does not fit key-value slots.
    """

    def __init__(  # noqa: PLR0913  # every one but the first is optional, most by keyword only
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
        kv_cache_gib: float = 4.0,
        run_ahead: RunAheadLimit = "auto",
    ) -> None:
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size: expected at least 1, got {max_batch_size}")
        model = model_of(policy, device=device, dtype=dtype)
        max_model_len = context_length(model, max_model_len)
        num_slots = max_batch_size + max(1, max_batch_size // 8)
        self._policy = SlotModel(model, max_slots=num_slots, max_tokens=max_model_len)
        tokenizer = tokenizer_of(policy, tokenizer)
        super().__init__(
            limits=EngineLimits(
                vocab_size=self._policy.vocab_size,
                max_model_len=max_model_len,
                has_expert=expert is not None,
                has_tokenizer=tokenizer is not None,
            ),
            tokenizer=tokenizer,
        )
        self._batch = Batch(num_slots)
        self._tails = Tails(num_slots)
        self._decoding = Decoding(
            policy=self._policy,
            batch=self._batch,
            tails=self._tails,
            run_ahead=RunAhead(run_ahead, is_remote=hasattr(expert, "advise")),
            stats=self._stats,
        )
        expert_slots: SlotModel | None = None
        self._advisor: Advisor | None = None
        if expert is not None and hasattr(expert, "advise"):
            self._advisor = RemoteAdvisor(
                self._decoding, ExpertLink(expert, vocab_size=self._policy.vocab_size)
            )
        elif expert is not None:
            check_vocabulary(policy, expert)
            beside = self._beside(model_of(expert, device=device, dtype=dtype), num_slots)
            self._advisor = ColocatedAdvisor(self._decoding, beside)
            expert_slots = beside.slots
        is_eos = eos_table(model, tokenizer, eos_token_ids, vocab_size=self._policy.vocab_size)
        self._drafter = Drafter(
            self._decoding,
            is_eos=is_eos,
            tokenizer=tokenizer,
            has_expert=self._advisor is not None,
        )
        self._prefill = Prefill(self._policy, self._batch, self._stats)
        self._caches = [self._policy] if expert_slots is None else [self._policy, expert_slots]
        self._room = _room(
            self._caches,
            num_slots=max_batch_size,
            num_priority_slots=num_slots - max_batch_size,
            max_model_len=max_model_len,
            kv_cache_gib=kv_cache_gib,
        )
        self._reserved = (0, 0)
        # Unique among engines, because several may share one remote expert.
        self._next_sequence_id = secrets.randbits(30) << 32
        self._version = 0
        self._weights_lock = threading.Lock()
        self._pending_weights: tuple[dict[str, Tensor], int] | None = None

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next decode step uses."""
        pending = self._pending_weights
        return self._version if pending is None else pending[1]

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
        """Admit what fits, then do one round of work (`Engine.step`)."""
        with self._step_lock, torch.inference_mode():
            self._apply_pending_weights()
            outputs = self._end_cancelled()
            self._admit()
            self._prefill.advance()
            if self._advisor is not None:
                changed = self._advisor.consult()
                if len(changed):
                    self._drafter.note_endings(changed)
            self._drafter.draft(version=self._version)
            return outputs + self._hand_out()

    def close(self) -> None:
        """End the thread that talks to a remote expert; the engine cannot be used any more."""
        if self._advisor is not None:
            self._advisor.close()

    def _apply_pending_weights(self) -> None:
        with self._weights_lock:
            pending, self._pending_weights = self._pending_weights, None
            if pending is not None:
                self._swap(*pending)

    def _swap(self, state_dict: Mapping[str, Tensor], version: int) -> None:
        copy_weights(self._policy.model, state_dict)
        self._version = version
        self._prefill.restart(version)
        self._stats.weight_swaps += 1

    def _end_cancelled(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for request_id in self._cancelled:
            for job, sample in self._scheduler.withdraw(request_id):
                outputs.append(self._withdrawn(job, sample))
            rows = enumerate(self._batch.rows)
            slots = [slot for slot, row in rows if row.job.request_id == request_id]
            outputs += self._end(dict.fromkeys(slots, StopReason.CANCELLED))
            self._prefill.forget(request_id)
        self._cancelled.clear()
        return outputs

    def _admit(self) -> None:
        batch = self._batch
        admitted = self._scheduler.admit(
            self._room, num_rows=batch.num_rows, longest=self._longest()
        )
        for job, sample in admitted:
            slot = batch.add(self._row(job, sample))
            self._tails.forget([slot])
        if admitted:
            self._reserve()

    def _reserve(self) -> None:
        """Room in the caches for every row at its longest; ahead of need, so that this is rare."""
        num_slots, num_tokens = self._reserved
        needed_slots, needed_tokens = self._batch.num_rows, self._longest()
        if needed_slots <= num_slots and needed_tokens <= num_tokens:
            return
        num_tokens = max(num_tokens, needed_tokens)
        if needed_slots * num_tokens > self._room.num_tokens:
            num_tokens = needed_tokens
        most = min(len(self._policy.lengths), self._room.num_tokens // num_tokens)
        num_slots = max(needed_slots, min(most, max(num_slots, 2 * needed_slots)))
        self._reserved = num_slots, num_tokens
        for cache in self._caches:
            cache.reserve(num_slots, num_tokens)

    def _longest(self) -> int:
        """Tokens of the row that may become the longest."""
        n = self._batch.num_rows
        return int((self._batch.prompt_len[:n] + self._batch.limit[:n]).max(initial=0))

    def _row(self, job: Job, sample: int) -> Row:
        self._next_sequence_id += 1
        return Row(
            job=job,
            sample_index=sample,
            sequence_id=self._next_sequence_id,
            prefill_version=self._version,
        )

    def _hand_out(self) -> list[StepOutput]:
        """What was settled since the last step; finished rows free their slots."""
        batch, n = self._batch, self._batch.num_rows
        slots = np.flatnonzero(batch.num_settled[:n] > batch.num_emitted[:n])
        if not len(slots):
            return []
        starts, stops = batch.num_emitted[slots], batch.num_settled[slots]
        tokens, sources = batch.records["token_ids"], batch.records["sources"]
        if (stops - starts == 1).all():  # the usual case, without a loop over slices
            new_tokens = tokens[slots, starts][:, None].tolist()
            new_sources = sources[slots, starts]
        else:
            spans = list(zip(slots.tolist(), starts.tolist(), stops.tolist(), strict=True))
            new_tokens = [tokens[slot, start:stop].tolist() for slot, start, stop in spans]
            new_sources = np.concatenate([sources[slot, i:j] for slot, i, j in spans])
        batch.num_emitted[slots] = stops
        self._decoding.run_ahead.observe_settled(len(new_sources))
        self._stats.policy_tokens += len(new_sources)
        self._stats.gated_tokens += int(np.count_nonzero(new_sources))
        self._stats.interventions += int(np.count_nonzero(new_sources == TokenSource.EXPERT))
        outputs = [
            StepOutput(
                request_id=batch.rows[slot].job.request_id,
                sample_index=batch.rows[slot].sample_index,
                num_tokens=count,
                new_token_ids=new,
            )
            for slot, count, new in zip(slots.tolist(), stops.tolist(), new_tokens, strict=True)
        ]
        is_done = (batch.ending[slots] != Ending.NONE) & (self._tails.count[slots] == 0)
        done = np.flatnonzero(is_done).tolist()
        reasons = {int(slots[i]): STOP_REASONS[Ending(batch.ending[slots[i]])] for i in done}
        for index, ended in zip(done, self._end(reasons), strict=True):
            outputs[index].finished = ended.finished
        return outputs

    def _end(self, ends: Mapping[int, StopReason]) -> list[StepOutput]:
        """Hand back rollouts and free their slots; one output a slot, in the order given."""
        if not ends:
            return []
        batch = self._batch
        outputs = []
        for slot, reason in ends.items():
            row, recorded = batch.rows[slot], batch.recorded(slot)
            outputs.append(self._output(row, recorded, reason))
        for slot in ends:
            self._policy.truncate(slot, 0)
        if self._advisor is not None:
            self._advisor.end(list(ends))
        sources, targets = batch.remove(list(ends))
        self._policy.move(sources, targets)
        self._tails.move(sources, targets)
        if self._advisor is not None:
            self._advisor.move(sources, targets)
        return outputs

    def _output(self, row: Row, recorded: dict[str, Any], reason: StopReason) -> StepOutput:
        num_tokens = len(recorded["token_ids"])
        return StepOutput(
            request_id=row.job.request_id,
            sample_index=row.sample_index,
            num_tokens=num_tokens,
            finished=self._rollout(
                row.job,
                recorded,
                reason,
                interventions=row.interventions,
                top_logprobs=row.top_logprobs[:num_tokens],
                expert_lost=row.expert_lost,
            ),
        )

    def _withdrawn(self, job: Job, sample: int) -> StepOutput:
        nothing: dict[str, Any] = {name: np.zeros(0, dtype) for name, dtype in RECORDED.items()}
        return self._output(self._row(job, sample), nothing, StopReason.CANCELLED)

    def _beside(self, model: Any, num_slots: int) -> ExpertModel:
        expert = ExpertModel(model, max_slots=num_slots, max_tokens=self.max_model_len)
        if expert.slots.vocab_size != self._policy.vocab_size:
            raise VocabularyMismatch(
                f"expected policy and expert of one vocabulary, got {self._policy.vocab_size} and "
                f"{expert.slots.vocab_size} tokens"
            )
        return expert


def _room(
    caches: Sequence[SlotModel],
    *,
    num_slots: int,
    num_priority_slots: int,
    max_model_len: int,
    kv_cache_gib: float,
) -> Room:
    """Slots and tokens that fit into the memory given.

    Raises:
        ConfigError: not even one rollout of the longest kind fits.
    """
    bytes_per_token = sum(cache.bytes_per_token for cache in caches)
    num_tokens = int(kv_cache_gib * 2**30 / bytes_per_token)
    if num_tokens < max_model_len:
        needed = max_model_len * bytes_per_token / 2**30
        raise ConfigError(
            f"kv_cache_gib: expected at least {needed:.2f}, the keys and values of one rollout of "
            f"max_model_len = {max_model_len} tokens, got {kv_cache_gib:g}; raise it or lower "
            "max_model_len"
        )
    return Room(num_slots=num_slots, num_priority_slots=num_priority_slots, num_tokens=num_tokens)
