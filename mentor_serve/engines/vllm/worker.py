"""What runs inside vLLM's worker: our samplers in place of its own, and weights that change.

With `samplers` and `draft_length` the only module that touches vLLM's internals; `PRIVATE_NAMES`
lists what of them is not imported by name, and a vLLM without it is refused at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mentor_serve.engines.vllm.rows import StepRecords
from mentor_serve.engines.vllm.samplers import MixedSampler, PolicySampler
from mentor_serve.errors import ConfigError

PRIVATE_NAMES = {
    "model_runner": (
        "_get_spec_decode_draft_probs",
        "discard_request_mask",
        "input_batch",
        "model",
        "model_config",
        "requests",
        "sampler",
        "speculative_config",
    ),
    "model_runner.discard_request_mask": ("np",),
    "model_runner.input_batch": ("num_tokens_no_spec", "req_ids"),
}
"""What the worker is expected to hold beyond vLLM's public interface, by owner."""
PRIVATE_NAMES_WITH_EXPERT = {
    "model_runner": ("drafter", "rejection_sampler"),
    "model_runner.drafter": ("_sample_from_logits", "model", "propose"),
    "model_runner.speculative_config": ("draft_model_config",),
}


def missing_names(worker: Any, names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Which of the private names the worker lacks."""
    missing = []
    for owner, attributes in names.items():
        holder = worker
        for part in owner.split("."):
            holder = getattr(holder, part, None)
        missing += [f"{owner}.{name}" for name in attributes if not hasattr(holder, name)]
    return missing


class MentorWorker:
    """Mixed into vLLM's worker (`worker_extension_cls`); methods are called by `collective_rpc`."""

    model_runner: Any

    def mentor_install(self) -> None:
        """Replace the samplers; to be called once, before the first request.

        Raises:
            ConfigError: vLLM is built differently than expected.
        """
        missing = missing_names(self, PRIVATE_NAMES)
        if not missing and self.model_runner.speculative_config is not None:
            missing = missing_names(self, PRIVATE_NAMES_WITH_EXPERT)
        if missing:
            raise ConfigError(
                f"vLLM's worker lacks {', '.join(missing)}, which version 0.32.0 has; install that"
            )
        runner = self.model_runner
        if runner.speculative_config is None:
            runner.sampler = PolicySampler(runner)
            return
        sampler = MixedSampler(runner)
        runner.sampler = sampler.without_drafts
        runner.rejection_sampler = sampler
        runner._get_spec_decode_draft_probs = lambda metadata: None
        runner.drafter._sample_from_logits = sampler.draft
        propose = runner.drafter.propose

        def propose_from_start(**arguments: Any) -> Tensor:
            sampler.begin_drafts()
            drafted: Tensor = propose(**arguments)
            return drafted

        runner.drafter.propose = propose_from_start

    def mentor_take_records(self) -> StepRecords | None:
        """What the last step settled, or None if it sampled nothing."""
        sampler = self._mentor_sampler()
        records: StepRecords | None = sampler.records
        sampler.records = None
        return records

    def mentor_load_policy(self, state_dict: Mapping[str, Tensor], version: int) -> None:
        """Replace the policy's weights, and stamp what it draws from now on with `version`."""
        runner = self.model_runner
        config = runner.speculative_config
        if config is None:
            _load(runner.model, state_dict, runner.model_config)
        else:
            _load(runner.drafter.model, state_dict, config.draft_model_config)
        self._mentor_sampler().version = version

    def mentor_load_expert(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the expert's weights."""
        _load(self.model_runner.model, state_dict, self.model_runner.model_config)

    def _mentor_sampler(self) -> Any:
        runner = self.model_runner
        return runner.sampler if runner.speculative_config is None else runner.rejection_sampler


def _load(model: Any, state_dict: Mapping[str, Tensor], model_config: Any) -> None:
    """Load weights by their checkpoint names, layer by layer, into what the kernels read."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    with torch.no_grad():
        initialize_layerwise_reload(model)
        model.load_weights(iter(state_dict.items()))
        finalize_layerwise_reload(model, model_config)
        head = getattr(model, "lm_head", None)
        if getattr(model_config.hf_config, "tie_word_embeddings", False) and hasattr(
            head, "cpu_linear"
        ):
            # On the CPU a tied lm_head keeps multiplying by its old packed copy.
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)
