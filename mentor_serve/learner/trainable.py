"""A model made ready for training, and its weights as everyone else knows them.

Whatever a backend does with the parameters (adapters, partitions), others see one thing: the
weights under Hugging Face's names, tied ones once, in float32. *Raw* names are those of the
prepared module; *published* names those of the model's files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mentor_serve.errors import ConfigError, WeightsError
from mentor_serve.learner.config import LoraOptions, TrainingOptions

_MASKED_ATTENTION = ("sdpa", "eager")
_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


class Trainable:
    """A causal LM with float32 parameters, without dropout, its adapters injected if there are any.

    Raises:
        ConfigError: LoRA without peft, or modules that the model does not have.
    """

    def __init__(self, model: PreTrainedModel, options: TrainingOptions) -> None:
        self.options = options
        self.skeleton = model
        """Configuration and file layout; not for its weights."""
        # Half precision would lose small updates in rounding; autocast computes in it instead.
        self.model = model.to(device=torch.device(options.device), dtype=torch.float32)
        self._tied = set(model.all_tied_weights_keys)
        self._published_names = set(model.state_dict()) - self._tied
        if model.config._attn_implementation not in _MASKED_ATTENTION:
            # Packed rows need an attention that takes a mask of its own.
            model.set_attn_implementation("sdpa")
        model.requires_grad_(True)
        if options.lora is not None:
            self.skeleton = skeleton_of(model)
            _inject(model, options.lora)
            self._reset_adapters()
        _disable_dropout(model)
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # checkpointing looks at this flag; dropout is gone
        else:
            model.eval()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser trains."""
        return [item for item in self.model.parameters() if item.requires_grad]

    def raw_tensors(self) -> dict[str, Tensor]:
        """The live tensors under raw names, tied ones once."""
        return {
            name: item
            for name, item in self.model.state_dict().items()
            if name.replace(_BASE, ".") not in self._tied
        }

    def published(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Independent CPU copies under published names, adapters merged: `W + scale B A`.

        Args:
            raw: whole tensors under raw names (a backend with partitions gathers them first).
        """
        state = {}
        for name, tensor in raw.items():
            if _DOWN in name or _UP in name:
                continue
            merged = tensor.detach().to("cpu", torch.float32, copy=True)
            down = raw.get(name.replace(_BASE, _DOWN)) if _BASE in name else None
            if down is not None and name.endswith("weight"):
                up = raw[name.replace(_BASE, _UP)]
                merged += self._lora_scale * (up.detach() @ down.detach()).to("cpu")
            state[name.replace(_BASE, ".")] = merged.contiguous()
        return state

    @torch.no_grad()
    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the weights; adapters start afresh.

        Raises:
            WeightsError: names or shapes that are not the model's; nothing was changed.
        """
        targets = {
            name.replace(_BASE, "."): tensor
            for name, tensor in self.raw_tensors().items()
            if _DOWN not in name and _UP not in name
        }
        given = {name: item for name, item in state_dict.items() if name not in self._tied}
        check_weights(targets, given)
        for name, tensor in targets.items():
            tensor.copy_(given[name])
        if self.options.lora is not None:
            self._reset_adapters()

    @torch.no_grad()
    def load_raw(self, raw: Mapping[str, Tensor]) -> None:
        """Restore what `raw_tensors` gave.

        Raises:
            WeightsError: names or shapes that are not the model's; nothing was changed.
        """
        targets = self.raw_tensors()
        check_weights(targets, raw)
        for name, tensor in targets.items():
            tensor.copy_(raw[name])

    @property
    def _lora_scale(self) -> float:
        lora = self.options.lora
        return 0.0 if lora is None else lora.scale / lora.rank

    @torch.no_grad()
    def _reset_adapters(self) -> None:
        """peft's own initialisation (A uniform, B zero), from this run's seed."""
        generator = torch.Generator().manual_seed(self.options.seed)
        for name, parameter in self.model.named_parameters():
            if _DOWN in name:
                bound = 1.0 / math.sqrt(parameter.shape[1])  # kaiming_uniform_ with a = sqrt(5)
                values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(values)
            elif _UP in name:
                parameter.zero_()


def _inject(model: PreTrainedModel, lora: LoraOptions) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "learner.lora_rank: expected the package peft; pip install 'mentor-serve[lora]'"
        ) from error
    modules: Any = list(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale,
        lora_dropout=0.0,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"learner.lora_target_modules: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_DOWN in name or _UP in name)


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without weights."""
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    skeleton.generation_config = model.generation_config
    return skeleton


def _disable_dropout(model: PreTrainedModel) -> None:
    """Dropout would make the ratio of Eq. 9 differ from 1 on fresh data."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def check_weights(targets: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Whether `given` has exactly the names and shapes of `targets`.

    Raises:
        WeightsError: it has not.
    """
    unexpected = sorted(given.keys() - targets.keys())
    missing = sorted(targets.keys() - given.keys())
    if unexpected or missing:
        raise WeightsError(
            f"expected the weights of this policy, but missing are {missing[:3]} and "
            f"unexpected are {unexpected[:3]}; check policy.model and the adapters' settings"
        )
    for name, tensor in targets.items():
        if tensor.shape != given[name].shape:
            raise WeightsError(
                f"weight {name}: expected shape {tuple(tensor.shape)}, got "
                f"{tuple(given[name].shape)}; check policy.model"
            )
