"""Generation engines: `TorchEngine` for any Hugging Face causal LM, one interface for all.

`TorchEngine` is imported on first use, so that importing the request types does not load torch.
"""

from typing import TYPE_CHECKING, Any

from mentor_serve.engines.base import Engine, EngineStats
from mentor_serve.types import Rollout, RolloutRequest, SamplingParams

if TYPE_CHECKING:
    from mentor_serve.engines.torch_engine import TorchEngine

__all__ = ["Engine", "EngineStats", "Rollout", "RolloutRequest", "SamplingParams", "TorchEngine"]


def __getattr__(name: str) -> Any:
    if name == "TorchEngine":
        from mentor_serve.engines.torch_engine import TorchEngine

        return TorchEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
