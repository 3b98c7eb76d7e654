"""Generation engines: `TorchEngine` for any Hugging Face causal LM, `VllmEngine` on vLLM.

One interface for both (`Engine`). They are imported on first use, so that importing the request
types loads neither torch nor vLLM.
"""

from typing import TYPE_CHECKING, Any

from mentor_serve.engines.base import Engine, EngineStats
from mentor_serve.types import Rollout, RolloutRequest, SamplingParams

if TYPE_CHECKING:
    from mentor_serve.engines.torch_engine import TorchEngine
    from mentor_serve.engines.vllm.engine import VllmEngine

__all__ = [
    "Engine",
    "EngineStats",
    "Rollout",
    "RolloutRequest",
    "SamplingParams",
    "TorchEngine",
    "VllmEngine",
]


def __getattr__(name: str) -> Any:
    if name == "TorchEngine":
        from mentor_serve.engines.torch_engine import TorchEngine

        return TorchEngine
    if name == "VllmEngine":
        from mentor_serve.engines.vllm.engine import VllmEngine

        return VllmEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
