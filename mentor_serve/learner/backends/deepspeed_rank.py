"""One rank of DeepSpeed's data-parallel group: an engine around the scorer of response tokens.

DeepSpeed partitions, reduces, clips and steps (at stage 0 it only reduces). Parameters are float32:
with them DeepSpeed leaves out a step whose gradient is not finite, as the other backends do.
This module imports no deepspeed at the top: the accelerator is chosen by the environment that the
process has when deepspeed is imported first.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mentor_serve.learner.backends.options import ModelBlueprint, RankOptions
from mentor_serve.learner.config import TrainingOptions, UpdateConfig
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.packing import MicroBatch
from mentor_serve.learner.sharding import RankShare
from mentor_serve.learner.step import MiniBatchSums, fill_gradients, run_share
from mentor_serve.learner.trainable import Trainable

TAG = "ranks"
"""Folder of the ranks' files within a checkpoint."""
_LARGEST_BUCKET = 5 * 10**8
"""DeepSpeed's default, in elements; it allocates them whatever the model's size is."""


class DeepSpeedRank:
    """One `Rank`; runs in a process of its own."""

    def __init__(
        self,
        rank: int,
        *,
        blueprint: ModelBlueprint,
        options: TrainingOptions,
        ranks: RankOptions,
    ) -> None:
        self._rank = rank
        self._blueprint = blueprint
        self._options = options
        self._ranks = ranks
        self._store: Any = None
        self._trainable: Trainable | None = None
        self._module: ScoredModel | None = None
        self._engine: Any = None
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": "0",  # Ray shows each actor its own GPU alone
            "WORLD_SIZE": str(ranks.num_learners),
            "DS_ACCELERATOR": "cuda" if options.device.startswith("cuda") else "cpu",
        }
        if ranks.num_threads:
            torch.set_num_threads(ranks.num_threads)

    def address(self) -> str:
        """Of the node this rank runs on."""
        import ray

        return str(ray.util.get_node_ip_address())

    def open_store(self, host: str) -> int:
        """Rank 0: serve the meeting point; returns its port."""
        self._store = TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout
        )
        return int(self._store.port)

    def join(self, host: str, port: int) -> None:
        """Meet the other ranks and build the first engine, with random weights."""
        if self._store is None:
            self._store = TCPStore(host, port, timeout=self._timeout)
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        torch.distributed.init_process_group(
            "nccl" if self._options.device.startswith("cuda") else "gloo",
            store=self._store,
            rank=self._rank,
            world_size=self._ranks.num_learners,
            timeout=self._timeout,
        )
        import deepspeed
        from deepspeed.utils import logger

        # Its INFO is written for one person at a terminal: hundreds of lines a start.
        logger.setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that torch is about to give up: a line a call.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        # An operator for shared memory that takes a compiler and a minute; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), verbose=False, timeout=self._timeout
        )

    # The six calls of a rank

    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take these weights in a new engine: fresh adapters and moments."""
        trainable = Trainable(self._blueprint.build(), self._options)
        trainable.load_published(state_dict)
        self._build_engine(trainable)

    def train_on(self, share: RankShare, config: UpdateConfig) -> list[MiniBatchSums]:
        """Make one update together with the other ranks."""
        learning_rate = self._options.learning_rate * config.learning_rate_scale
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        module = self._require(self._module)
        module.scorer.temperature = config.temperature
        driver = _EngineDriver(self._engine, max_grad_norm=config.max_grad_norm)
        return run_share(self._engine, share, config, device=module.causal_lm.device, driver=driver)

    def published(self) -> dict[str, Tensor] | None:
        """All weights on the CPU; None on all ranks but the first, which all take part."""
        raw = self._gathered()
        return None if raw is None else self._require(self._trainable).published(raw)

    def save(self, directory: str) -> None:
        """Write this rank's files under `directory`."""
        self._engine.save_checkpoint(directory, tag=TAG, save_latest=False)

    def load(self, directory: str) -> None:
        """Restore what `save` wrote, in a new engine: ZeRO-3 cannot load into a used one."""
        self._build_engine(Trainable(self._blueprint.build(), self._options))
        path, _ = self._engine.load_checkpoint(directory, tag=TAG, load_lr_scheduler_states=False)
        if path is None:
            raise FileNotFoundError(f"{Path(directory) / TAG}: DeepSpeed found no checkpoint")
        # A changed setting must count after a restart.
        for group in self._engine.optimizer.param_groups:
            group["weight_decay"] = self._options.weight_decay

    def load_optimizer(self, directory: str) -> None:
        """Restore the moments alone: everything, then today's weights over it."""
        names = set(self._require(self._trainable).raw_tensors())
        current = self._gathered(to_all=True)
        self.load(directory)
        self._overwrite({name: item for name, item in current.items() if name in names})

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._ranks.call_timeout_s)

    def _build_engine(self, trainable: Trainable) -> None:
        import deepspeed

        if self._engine is not None:
            self._engine.destroy()
        self._trainable, self._module = trainable, ScoredModel(trainable, self._options)
        optimizer = torch.optim.AdamW(
            trainable.parameters,
            lr=self._options.learning_rate,
            weight_decay=self._options.weight_decay,
        )
        self._engine, *_ = deepspeed.initialize(
            model=self._module,
            optimizer=optimizer,
            config=engine_config(self._ranks, trainable),
            dist_init_required=False,
        )

    def _gathered(self, *, to_all: bool = False) -> Any:
        """Whole tensors under raw names on the CPU, on rank 0 or on all; every rank takes part."""
        import deepspeed

        keeps = to_all or self._rank == 0
        trainable = self._require(self._trainable)
        raw = dict(trainable.raw_tensors()) if keeps else {}
        for name, parameter in trainable.model.named_parameters():
            if not hasattr(parameter, "ds_id"):
                continue
            # One at a time: a whole model may not fit beside the partitions.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                if name in raw:
                    raw[name] = parameter.detach().to("cpu", copy=True)
        copied = {name: item.detach().to("cpu", copy=True) for name, item in raw.items()}
        return copied if keeps else None

    @torch.no_grad()
    def _overwrite(self, raw: Mapping[str, Tensor]) -> None:
        """Replace the weights and keep the moments."""
        import deepspeed

        trainable = self._require(self._trainable)
        for name, parameter in trainable.model.named_parameters():
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self._rank == 0:
                        parameter.copy_(raw[name])
        if self._ranks.zero_stage < 3:
            trainable.load_raw(raw)
        if self._ranks.zero_stage > 0:
            self._engine.optimizer.refresh_fp32_params()

    @staticmethod
    def _require(value: Any) -> Any:
        if value is None:
            raise RuntimeError("expected a rank with a model; call load_published or load first")
        return value


class ScoredModel(nn.Module):
    """The one module that DeepSpeed wraps: ZeRO-3 fetches parameters in hooks of `forward`."""

    def __init__(self, trainable: Trainable, options: TrainingOptions) -> None:
        super().__init__()
        self.causal_lm = trainable.model
        # Before DeepSpeed takes the parameters apart: the scorer tries the head once.
        self.scorer = ResponseScorer(self.causal_lm, temperature=1.0, autocast=options.autocast)

    def forward(self, micro_batch: MicroBatch | None) -> Tensor:
        """log pi_theta of each target, [N]; for None a 0 (0-d) that depends on the parameters."""
        if micro_batch is not None:
            return self.scorer(micro_batch)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.causal_lm.device)
        logits: Tensor = self.causal_lm(input_ids=ids, use_cache=False).logits
        return logits.sum() * 0.0


def engine_config(ranks: RankOptions, trainable: Trainable) -> dict[str, Any]:
    """DeepSpeed's configuration of one rank."""
    num_elements = sum(item.numel() for item in trainable.parameters)
    zero: dict[str, Any] = {
        "stage": ranks.zero_stage,
        "reduce_bucket_size": min(_LARGEST_BUCKET, max(1, num_elements)),
    }
    if ranks.zero_offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if ranks.zero_offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        # Passes differ in size and Eq. 9 counts tokens: what DeepSpeed makes of this is not used.
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {**zero, **ranks.zero_options},
        # DeepSpeed's own Adam has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
    }


class _EngineDriver:
    """`OptimizerDriver` over a DeepSpeed engine."""

    def __init__(self, engine: Any, *, max_grad_norm: float) -> None:
        self._engine = engine
        self._max_grad_norm = max_grad_norm
        self._has_gradient = False

    def zero_grad(self) -> None:
        """Begin a mini-batch; the engine frees gradients when it steps."""
        self._has_gradient = False

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Tell the engine which pass ends the mini-batch."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate; DeepSpeed averages over ranks, so that this makes a sum of it."""
        self._has_gradient = True
        self._engine.backward(loss * self._engine.world_size)

    def finish(self) -> float:
        """Clip and step."""
        if not self._has_gradient:
            # All ranks are here: their shares have equal numbers of micro-batches.
            with self.micro_batch(is_last=True):
                self.backward(self._engine(None))
        if self._engine.zero_optimization_stage() == 0:
            return self._step_replicated()
        optimizer = self._engine.optimizer
        optimizer.clip_grad = self._max_grad_norm
        self._engine.step()
        return math.inf if optimizer.overflow else float(self._engine.get_global_grad_norm())

    def _step_replicated(self) -> float:
        """Stage 0 reduces gradients, but neither clips by the norm of today nor looks at it."""
        parameters = [
            item for group in self._engine.optimizer.param_groups for item in group["params"]
        ]
        fill_gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm
