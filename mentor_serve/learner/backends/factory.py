"""Backends by name. Each is imported when it is asked for: RLlib alone takes seconds."""

from __future__ import annotations

from importlib.util import find_spec

from mentor_serve.errors import ConfigError
from mentor_serve.learner.backends.base import TrainingBackend
from mentor_serve.learner.backends.options import BackendName, RankOptions
from mentor_serve.learner.config import TrainingOptions


def build_backend(
    name: BackendName, options: TrainingOptions, ranks: RankOptions | None = None
) -> TrainingBackend:
    """A backend without a model; `ranks` says nothing to `torch`.

    Raises:
        ConfigError: the name is unknown, a package is missing, or `ranks` do not fit the backend.
    """
    match name:
        case "torch":
            from mentor_serve.learner.backends.torch_backend import TorchBackend

            return TorchBackend(options)
        case "rllib":
            _need(name, "gymnasium", "'ray[rllib]'")
            from mentor_serve.learner.backends.rllib import RllibBackend

            return RllibBackend(options, ranks)
        case "deepspeed":
            _need(name, "deepspeed", "'mentor-serve[deepspeed]'")
            from mentor_serve.learner.backends.deepspeed import DeepSpeedBackend

            return DeepSpeedBackend(options, ranks)
    raise ConfigError(f"learner.backend: expected torch, rllib or deepspeed, got {name!r}")


def _need(name: str, package: str, requirement: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"learner.backend = {name!r}: expected the package {package}; pip install {requirement}"
        )
