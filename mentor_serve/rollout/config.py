"""How one collector works."""

from __future__ import annotations

from dataclasses import dataclass, field

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.strategies import GroupShape, GuidanceConfig
from mentor_serve.store.writer import WriterLimits
from mentor_serve.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorConfig:
    """Sizes, budgets and the guidance of one collector's groups."""

    num_on_policy: int = 8
    """N1 (paper: 8)."""
    num_mixed: int = 4
    """N2 while alpha > 0 (paper: 4)."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Of the policy, the mixture and the expert alike."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    concurrent_groups: int = 8
    """Groups under way at the same time."""
    record_mixed: bool = False
    """Ask the expert at every token of mixed rollouts."""
    seed: int = 0
    collector_index: int = 0
    """Number of this collector, so that no two sample the same task under the same seed."""
    num_collectors: int = 1
    """Collectors of the run; each resumes its own share of the task sequence."""
    max_ready_groups: int | None = None
    """Ready groups at which collection waits for the learner; None never waits."""
    max_away_groups: int | None = None
    """The same while the store is away and nobody trains; None is `max_ready_groups`."""
    writer_limits: WriterLimits = field(default_factory=WriterLimits)
    """Bounds of what is on its way to the store."""
    sample_timeout_s: float = 600.0
    """How long the engine may take for a group, and the expert for its solutions."""
    stop_timeout_s: float = 10.0
    """How long groups under way may take to end once the loop is told to stop."""
    first_backoff_s: float = 0.5
    longest_backoff_s: float = 30.0
    """Bounds of the pause after a failure of the engine or the store."""

    def __post_init__(self) -> None:
        if self.num_on_policy < 2 or self.num_mixed < 0 or self.concurrent_groups < 1:
            raise ConfigError(
                "expected num_on_policy >= 2, num_mixed >= 0 and concurrent_groups >= 1, got "
                f"{self.num_on_policy}, {self.num_mixed} and {self.concurrent_groups}"
            )
        if self.max_ready_groups is not None and self.max_ready_groups < 1:
            raise ConfigError(f"expected max_ready_groups >= 1, got {self.max_ready_groups}")

    @property
    def shape(self) -> GroupShape:
        """Sizes and sampling of a group."""
        return GroupShape(
            num_on_policy=self.num_on_policy,
            num_mixed=self.num_mixed,
            sampling=self.sampling,
            record_mixed=self.record_mixed,
        )
