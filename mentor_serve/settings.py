"""Every setting of the service in one tree.

Precedence, low to high: the defaults here (a laptop CPU with the bundled pair and SQLite), TOML
files in the order given, environment variables (`MENTOR_SERVE_LEARNER__LEARNING_RATE=1e-5`),
command-line flags. Unknown keys are errors. Names of the paper's knobs keep the paper's meaning;
where a default differs from the paper's value, the docstring gives both.

Only cli, actors, apps, dashboards and migrations read this module; the layers below take plain
arguments.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import EnvSettingsSource, SettingsError

from mentor_serve.errors import ConfigError
from mentor_serve.model_settings import ExpertSettings, PolicySettings, check_models
from mentor_serve.rank_settings import RankSettings
from mentor_serve.store_settings import StoreSettings

ENV_PREFIX = "MENTOR_SERVE_"
ENV_DELIMITER = "__"

PAPER_SYSTEM_PROMPT = (
    "Your task is to solve the given question step by step. You should conduct a systematic, "
    "thorough reasoning process before providing the final answer. Reason inside "
    "<think> and </think> first, then put the final answer in \\boxed{}."
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RolloutSettings(_Section):
    """Groups that the collectors ask for."""

    num_on_policy: int = Field(default=8, ge=2)
    """N1: on-policy rollouts of a prompt (paper: 8)."""
    num_mixed: NonNegativeInt = 4
    """N2: mixed rollouts of a prompt while alpha > 0 (paper: 4)."""
    temperature: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 112
    """Longest response in tokens (paper: 8192)."""
    num_collectors: PositiveInt = 1
    """Collector replicas."""
    concurrent_groups: PositiveInt = 8
    """Groups that one collector keeps in flight."""
    record_mixed: bool = False
    """Ask the expert at every token, so that no recorded value is NaN; costs expert passes."""
    seed: int = 0


class GuidanceSettings(_Section):
    """When the expert speaks (paper, section 3.1) and how its rollouts count (Eq. 11).

    `method` chooses between the paper's method and the baselines it compares with.
    """

    method: Literal["mentor", "on_policy", "luffy", "questa"] = "mentor"
    """`mentor`; `on_policy`: GRPO without the expert; `luffy`: whole expert trajectories in the
    group; `questa`: the first part of one as a hint in the prompt (docs/baselines.md)."""
    entropy_quantile: float = Field(default=0.95, gt=0, le=1)
    """p of gamma_p (paper: 0.95)."""
    initial_gamma: PositiveFloat = 999.0
    """gamma_p before the first update (paper: 999, so that w is about 0)."""
    gamma_floor: float = Field(default=0.0, ge=0)
    """Lower bound of gamma_p; 1.5 reproduces the authors' code, 0 the paper."""
    alpha_initial: float = Field(default=1.0, ge=0)
    alpha_steps: PositiveInt = 120
    """Updates over which alpha falls to 0 by a cosine (paper: 120)."""
    reward_range: PositiveFloat = 1.0
    """R_range of Eq. 11: the fixed span of the reward."""
    num_expert: PositiveInt = 1
    """luffy: how many of the `rollout.num_on_policy` places of a group are the expert's."""
    hint_fraction: float = Field(default=0.5, gt=0, lt=1)
    """questa: share of an expert trajectory's tokens that the prompt shows."""
    hint_later_fraction: float = Field(default=0.25, gt=0, lt=1)
    """questa: the share from update `hint_later_step` on."""
    hint_later_step: NonNegativeInt = 0
    """questa: 0 keeps `hint_fraction` (what MENTOR's paper compares with)."""
    hint_header: str = Field(default="## Hint: Partial Solution", min_length=1)
    """questa: the line before the hint."""
    expert_attempts: PositiveInt = 4
    """luffy, questa: failures in a row after which the expert is not asked about a task again."""
    max_uses: NonNegativeInt = 0
    """luffy, questa: groups of a run that one stored expert trajectory may serve before a new one
    is generated; 0: any number."""
    only_correct: bool = True
    """luffy, questa: use only expert trajectories whose answer is right."""


class TaskSettings(_Section):
    """What the policy is trained on."""

    source: Literal["reasoning_gym", "jsonl", "huggingface"] = "reasoning_gym"
    name: str = "embedded"
    """reasoning_gym: a data set name, or `embedded` for the bundled pair's task mix.
    jsonl: a file. huggingface: a data set id or a directory or file that `datasets` reads."""
    config: dict[str, Any] = Field(default_factory=dict)
    """reasoning_gym: arguments of the generator. huggingface: `split`, `name`, `data_files`."""
    seed: int = 0
    size: PositiveInt = 100_000
    """reasoning_gym: problems before the generator repeats itself."""
    system_prompt: str = PAPER_SYSTEM_PROMPT
    """Sent as the system message where the tokenizer's chat template has one."""
    split: str = "train"


class RewardSettings(_Section):
    """How a response is scored: `accuracy_weight * accuracy + format_weight * format`."""

    verifier: str = "auto"
    """`auto` (reasoning_gym tasks: their own scorer, others: Math-Verify), `math`,
    `reasoning_gym`, or `module:function` of your own."""
    accuracy_weight: float = Field(default=0.9, ge=0)
    format_weight: float = Field(default=0.1, ge=0)
    timeout_s: PositiveFloat = 5.0
    """A verifier that takes longer fails the rollout."""
    num_workers: PositiveInt = 1
    """Verifier processes of one collector."""


class LearnerSettings(RankSettings):
    """Mixed-policy GRPO (Eq. 9 to 11)."""

    enabled: bool = True
    """False: collect and serve only."""
    prompts_per_step: PositiveInt = 16
    """Groups of one update (paper: 128)."""
    mini_batch_prompts: PositiveInt = 16
    """Groups of one optimiser step (paper: 64)."""
    learning_rate: PositiveFloat = 1e-4
    """AdamW's; fits models of about a million parameters (paper, 7B: 1e-6)."""
    learning_rate_decay_steps: NonNegativeInt = 400
    """Updates over which the learning rate falls by a cosine; 0 keeps it (the paper's choice)."""
    learning_rate_final_ratio: float = Field(default=0.1, gt=0, le=1)
    """What is left of the learning rate after that."""
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: PositiveFloat = 0.28
    max_staleness: NonNegativeInt = 4
    """Groups whose oldest token is more versions behind than this become `stale`."""
    advantages: Literal["grpo", "leave_one_out", "dr_grpo"] = "grpo"
    """Of on-policy rollouts: Eq. 10; reward minus the mean of the others; or centred alone."""
    dynamic_sampling: bool = False
    """Fill updates with groups that teach something; the others are consumed and counted."""
    mask_truncated: bool = False
    """Leave out rollouts that ended at the length limit."""
    old_logprobs: Literal["recorded", "recomputed"] = "recorded"
    """pi_theta_old of Eq. 9: as recorded at generation, or under the weights before the update."""
    importance: Literal["none", "token", "sequence"] = "none"
    """With `recomputed`: weight by (before the update) / (recorded), of tokens or sequences."""
    importance_mode: Literal["clamp", "mask"] = "clamp"
    """Above `importance_cap`: the weight becomes the cap, or 0."""
    importance_cap: float = Field(default=2.0, ge=1)
    mixed_ratio: Literal["policy", "mixed"] = "policy"
    """Ratio of mixed tokens against the old policy (paper) or the recorded mixture (exact; needs
    `rollout.record_mixed`)."""
    expert_shaping: PositiveFloat = 0.1
    """LUFFY's constant for tokens of whole expert trajectories."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Type of matrix products; parameters and moments stay float32."""
    gradient_checkpointing: bool = False
    """Less memory for activations, about a third more time."""
    lora_rank: NonNegativeInt = 0
    """Train low-rank adapters of this rank instead of all weights (0); needs the extra `lora`."""
    lora_scale: PositiveInt = 32
    """peft's `lora_alpha`."""
    lora_target_modules: list[str] = Field(default_factory=lambda: ["all-linear"])
    max_tokens_per_micro_batch: PositiveInt = 4096
    """Prompt and response tokens of one forward pass."""
    max_steps: NonNegativeInt = 0
    """Stop after this many updates; 0 goes on for ever."""
    eval_every: Literal["auto"] | NonNegativeInt = "auto"
    """Evaluate versions that are multiples of this, as `evaluation` says; 0 never does. `auto`: 50
    for the bundled policy, 0 for others, which may need a device of their own for it."""
    checkpoint_every: PositiveInt = 1
    keep_checkpoints: PositiveInt = 3
    lease_s: PositiveFloat = 120.0
    """A learner that does not come back within this time loses its groups."""
    seed: int = 0
    num_cpus: PositiveFloat = 0.5
    num_gpus: float = Field(default=0.0, ge=0)
    num_threads: NonNegativeInt = 1


class EvaluationSettings(_Section):
    """How versions are measured on held-out problems: `mentor-serve eval`, `learner.eval_every`."""

    suite: str = Field(default="", max_length=200)
    """Name of the problems in `evaluations.suite`; empty: made from `tasks.source` and `.name`."""
    num_problems: PositiveInt = 64
    num_samples: NonNegativeInt = 4
    """Sampled responses to each problem, beside the greedy one; 0 leaves sampling out."""
    temperature: PositiveFloat = 0.6
    """Of sampled responses (paper: 0.6)."""
    ks: list[PositiveInt] = Field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """pass@k for those k that are at most `num_samples`."""
    words: Literal["figure_3"] | list[Annotated[str, Field(min_length=1, max_length=50)]] = (
        "figure_3"
    )
    """Words whose share of responses is counted; `figure_3`: those of the paper's Figure 3."""
    seed: int = 0
    """Of the sampled responses; the problems depend on `tasks.seed` alone."""
    device: str = "cpu"
    """Where the evaluator of a running service holds its copy of a version."""
    max_batch_size: PositiveInt = 64
    """Responses that it generates at the same time."""
    num_cpus: float = Field(default=0.1, ge=0)
    """CPUs that Ray books for it; its process runs at the lowest priority of the system."""
    num_gpus: float = Field(default=0.0, ge=0)
    num_threads: NonNegativeInt = 1


class WeightSettings(_Section):
    """Weight snapshots."""

    keep_versions: PositiveInt = 5
    """Snapshots kept on disk beside the live one."""
    swap_timeout_s: PositiveFloat = 60.0
    """How long a replica may take to load a snapshot before it is replaced."""


class GatewaySettings(_Section):
    """The HTTP front."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_keys: list[SecretStr] = Field(default_factory=list)
    """Bearer keys that may call the API; empty: no authentication."""
    admin_keys: list[SecretStr] = Field(default_factory=list)
    """Bearer keys for routes that change training; empty: the API keys."""
    cors_origins: list[str] = Field(default_factory=list)
    num_replicas: PositiveInt = 1
    num_cpus: PositiveFloat = 0.2
    request_timeout_s: PositiveFloat = 600.0
    drain_timeout_s: PositiveFloat = 20.0
    """How long a stopping service lets requests in flight finish."""


class TelemetrySettings(_Section):
    """Logs, the dashboard, and an experiment tracker."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["console", "json"] = "console"
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the numbers of each update also go; needs the extra `trackers`."""
    dashboard_port: int = Field(default=8501, ge=1, le=65535)


class Settings(_Section):
    """The whole tree; see the module docstring for precedence."""

    home: Path = Path(".mentor")
    """State directory: database, weights, checkpoints, logs (`MENTOR_SERVE_HOME`)."""
    run_name: str = Field(default="default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Runs of the same name continue each other."""
    policy: PolicySettings = PolicySettings()
    expert: ExpertSettings = ExpertSettings()
    rollout: RolloutSettings = RolloutSettings()
    guidance: GuidanceSettings = GuidanceSettings()
    tasks: TaskSettings = TaskSettings()
    reward: RewardSettings = RewardSettings()
    learner: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    store: StoreSettings = StoreSettings()
    weights: WeightSettings = WeightSettings()
    gateway: GatewaySettings = GatewaySettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @model_validator(mode="after")
    def _check_consistency(self) -> Settings:
        if self.rollout.max_new_tokens >= self.policy.max_model_len:
            raise ValueError(
                f"rollout.max_new_tokens ({self.rollout.max_new_tokens}) must be below "
                f"policy.max_model_len ({self.policy.max_model_len}), which also holds the prompt"
            )
        if self.learner.mini_batch_prompts > self.learner.prompts_per_step:
            raise ValueError(
                f"learner.mini_batch_prompts ({self.learner.mini_batch_prompts}) must not exceed "
                f"learner.prompts_per_step ({self.learner.prompts_per_step})"
            )
        self._check_guidance()
        check_models(self.policy, self.expert)
        if self.learner.importance != "none" and self.learner.old_logprobs != "recomputed":
            raise ValueError(
                f"learner.importance = {self.learner.importance!r} needs "
                "learner.old_logprobs = 'recomputed'"
            )
        if self.learner.mixed_ratio == "mixed" and not self.rollout.record_mixed:
            raise ValueError(
                "learner.mixed_ratio = 'mixed' needs rollout.record_mixed = true: only then is the "
                "mixture's log-probability known at every token"
            )
        return self

    def _check_guidance(self) -> None:
        guidance = self.guidance
        if guidance.method in ("luffy", "questa") and self.expert.model == "none":
            raise ValueError(
                f"guidance.method = {guidance.method!r} needs an expert, got expert.model = "
                "'none'; name one, or use guidance.method = 'on_policy'"
            )
        if guidance.method == "luffy" and self.rollout.num_on_policy - guidance.num_expert < 2:
            raise ValueError(
                f"guidance.num_expert ({guidance.num_expert}) must leave at least 2 of the "
                f"rollout.num_on_policy ({self.rollout.num_on_policy}) places to the policy"
            )

    @property
    def eval_every(self) -> int:
        """`learner.eval_every` with `auto` resolved."""
        every = self.learner.eval_every
        return every if every != "auto" else 50 * self.policy.model.startswith("embedded:")

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the store, password included: never print it."""
        if self.store.url is not None:
            return self.store.url.get_secret_value()
        return f"sqlite:///{self.home.resolve() / 'mentor.db'}"

    @property
    def weights_dir(self) -> Path:
        """Where this run's snapshots lie."""
        return self.home.resolve() / "weights" / self.run_name

    @property
    def checkpoints_dir(self) -> Path:
        """Where this run's checkpoints lie."""
        return self.home.resolve() / "checkpoints" / self.run_name

    @property
    def spool_dir(self) -> Path:
        """Groups of this run that wait for the database, a folder for each collector."""
        return self.home.resolve() / "spool" / self.run_name

    @property
    def logs_dir(self) -> Path:
        """Where log files lie."""
        return self.home.resolve() / "logs"


def load_settings(
    config_files: Iterable[str | os.PathLike[str]] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Resolve the tree from TOML files, the environment and `overrides` (dotted keys, highest).

    Raises:
        ConfigError: a file is missing or is not TOML, a key is unknown, a value is out of range.
    """
    tree: dict[str, Any] = {}
    for file in config_files:
        _merge(tree, _read_toml(Path(file)))
    _merge(tree, _read_environment())
    for dotted, value in (overrides or {}).items():
        _merge(tree, _nested(dotted, _parsed(value)))
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error


def _read_environment() -> dict[str, Any]:
    known = {name.upper() for name in Settings.model_fields}
    for variable in os.environ:
        section = variable.removeprefix(ENV_PREFIX).split(ENV_DELIMITER)[0]
        if variable.startswith(ENV_PREFIX) and section not in known:
            raise ConfigError(
                f"environment variable {variable}: no setting {section.lower()!r}; "
                f"expected {ENV_PREFIX}<SECTION>{ENV_DELIMITER}<KEY> with a section of "
                f"{', '.join(sorted(known))}"
            )
    source = EnvSettingsSource(
        Settings,  # type: ignore[arg-type]  # it reads model_fields and model_config alone
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
    )
    try:
        return source()
    except SettingsError as error:
        raise ConfigError(f"environment: {error}") from error


def _parsed(value: Any) -> Any:
    """Flags are strings: lists and tables among them are JSON, as in the environment."""
    if isinstance(value, str) and value[:1] in {"[", "{"}:
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"expected JSON, got {value!r}: {error}") from error
    return value


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    *sections, key = dotted.split(".")
    tree: dict[str, Any] = {key: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown setting (see `mentor-serve config show`)")
        else:
            lines.append(f"{key}: {item['msg']}, got {item['input']!r:.80}")
    return "; ".join(lines)
