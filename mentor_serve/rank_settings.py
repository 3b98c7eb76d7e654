"""Settings of what computes an update: the training backend and its ranks.

Part of `learner` in the tree of `mentor_serve.settings`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    model_validator,
)


class RankSettings(BaseModel):
    """The backend, where its ranks run, and what each gets. See docs/backends.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    backend: Literal["torch", "rllib", "deepspeed"] = "torch"
    """Plain torch in one process; RLlib's data-parallel learners; DeepSpeed's ZeRO ranks."""
    device: str = "cpu"
    """`cpu` or `cuda`, of every rank."""
    num_learners: NonNegativeInt = 0
    """Ranks with a process of their own; 0 trains in the learner's process (torch, rllib)."""
    num_cpus_per_learner: PositiveFloat = 0.5
    """CPUs that Ray books for a rank, beside the learner's own."""
    num_gpus_per_learner: Literal[0, 1] = 0
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed partitions: 1 the optimiser's state, 2 gradients too, 3 parameters too."""
    zero_offload: Literal["none", "optimizer", "parameters"] = "none"
    """What DeepSpeed keeps in CPU memory; `parameters` includes the optimiser's state."""
    zero_options: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization` section."""
    rank_timeout_s: PositiveFloat = 1800.0
    """How long a rank may take for one call; one that dies is noticed at once."""

    @model_validator(mode="after")
    def _check_ranks(self) -> RankSettings:
        if self.backend == "torch" and self.num_learners > 0:
            raise ValueError(
                f"learner.num_learners ({self.num_learners}) must be 0 with learner.backend = "
                "'torch', which trains in the learner's process; use 'rllib' or 'deepspeed'"
            )
        if self.backend == "deepspeed" and self.num_learners == 0:
            raise ValueError(
                "learner.num_learners must be at least 1 with learner.backend = 'deepspeed': its "
                "ranks are processes of their own"
            )
        is_cuda = self.device.startswith("cuda")
        if self.num_learners > 0 and is_cuda != (self.num_gpus_per_learner == 1):
            raise ValueError(
                f"learner.device = {self.device!r} and learner.num_gpus_per_learner = "
                f"{self.num_gpus_per_learner} do not fit: use 'cuda' with 1, 'cpu' with 0"
            )
        return self

    @model_validator(mode="after")
    def _check_zero(self) -> RankSettings:
        if self.backend != "deepspeed" and (self.zero_offload != "none" or self.zero_options):
            raise ValueError(
                "learner.zero_offload and learner.zero_options need learner.backend = 'deepspeed', "
                f"got {self.backend!r}"
            )
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.zero_offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"learner.zero_offload = {self.zero_offload!r} needs learner.zero_stage of at "
                f"least {needed}, got {self.zero_stage}"
            )
        return self
