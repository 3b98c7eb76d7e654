"""Where tasks come from: reasoning-gym, JSONL files, Hugging Face data sets, users' submissions."""

from mentor_serve.rollout.tasks.build import build_source
from mentor_serve.rollout.tasks.sources import SubmittedTasks, TaskSource

__all__ = ["SubmittedTasks", "TaskSource", "build_source"]
