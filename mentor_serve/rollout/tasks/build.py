"""Builds the task source that the `tasks` settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.tasks.huggingface import read_huggingface
from mentor_serve.rollout.tasks.jsonl import read_jsonl
from mentor_serve.rollout.tasks.reasoning_gym import EMBEDDED, ReasoningGymSource, embedded_parts
from mentor_serve.rollout.tasks.sources import ListSource, Position, TaskSource


def build_source(
    *,
    source: str,
    name: str,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    size: int = 100_000,
    split: str = "train",
    shard: int = 0,
    num_shards: int = 1,
) -> TaskSource:
    """Return the source; arguments are those of the `tasks` settings.

    `shard` of `num_shards` collectors draws every `num_shards`-th task, so that no two collectors
    work on the same one.

    Raises:
        ConfigError: an unknown source, or anything the source itself refuses.
    """
    config = dict(config or {})
    position = Position(shard=shard, num_shards=num_shards)
    match source:
        case "reasoning_gym":
            if name == EMBEDDED and config:
                raise ConfigError(
                    "tasks.config must be empty for tasks.name = 'embedded': the bundled pair "
                    "brings its own; name the data set (chain_sum) to configure it"
                )
            parts = embedded_parts() if name == EMBEDDED else [(name, config)]
            return ReasoningGymSource(parts, seed=seed, size=size, position=position)
        case "jsonl":
            if config:
                raise ConfigError(f"tasks.config must be empty for source jsonl, got {config!r}")
            tasks = read_jsonl(name, split=split)
            return ListSource(tasks, name=f"jsonl:{Path(name).name}", seed=seed, position=position)
        case "huggingface":
            tasks = read_huggingface(name, split=split, config=config)
            return ListSource(tasks, name=f"huggingface:{name}", seed=seed, position=position)
        case _:
            raise ConfigError(
                f"tasks.source {source!r}: expected reasoning_gym, jsonl or huggingface"
            )
