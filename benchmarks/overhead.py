"""How much of an engine's step is not its models' forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import synchronize
from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.engines.slots.slot_model import SlotModel

_TIMED = ("decode", "read")


@dataclass(slots=True)
class Clock:
    """Time spent in models so far."""

    seconds: float = 0.0


def step_overhead(
    engine: TorchEngine, prompt: tuple[int, ...], *, batch: int, new_tokens: int, device: str
) -> dict[str, float]:
    """Run `batch` rollouts of one prompt after a warm-up; times are means of a step."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    step_s: list[float] = []
    clock = Clock()
    for seed in range(2):
        step_s.clear()
        clock.seconds = 0.0
        engine.submit(
            RolloutRequest(prompt_token_ids=prompt, num_samples=batch, seed=seed, sampling=sampling)
        )
        with model_clock(clock, device=device):
            while engine.has_unfinished():
                started = time.perf_counter()
                engine.step()
                step_s.append(time.perf_counter() - started)
    total = sum(step_s)
    return {
        "batch": batch,
        "step_ms": round(1e3 * total / len(step_s), 4),
        "model_ms": round(1e3 * clock.seconds / len(step_s), 4),
        "overhead_share": round((total - clock.seconds) / total, 4),
    }


@contextmanager
def model_clock(clock: Clock, *, device: str) -> Iterator[None]:
    """While open, every forward of every `SlotModel` adds its time to `clock`."""
    originals: dict[str, Callable[..., Any]] = {name: getattr(SlotModel, name) for name in _TIMED}
    try:
        for name, original in originals.items():
            setattr(SlotModel, name, _timed(original, clock, device))
        yield
    finally:
        for name, original in originals.items():
            setattr(SlotModel, name, original)


def _timed(original: Callable[..., Any], clock: Clock, device: str) -> Callable[..., Any]:
    def timed(*arguments: Any, **keywords: Any) -> Any:
        synchronize(device)
        started = time.perf_counter()
        result = original(*arguments, **keywords)
        synchronize(device)
        clock.seconds += time.perf_counter() - started
        return result

    return timed
