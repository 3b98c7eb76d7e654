"""`serve run` on the user's own configuration: own model directory, own tasks, remote expert."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from mentor_serve.models.reference import reference_path

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

CONFIG = """
[policy]
model = "{model}"

[expert]
placement = "remote"

[tasks]
source = "jsonl"
name = "{tasks}"

[reward]
verifier = "math"
"""


def write_tasks(path: Path) -> None:
    lines = []
    for a in range(1, 10):
        for b in range(1, 10):
            prompt = f"State the final answer to the following arithmetic problem: {a} + {b} ="
            lines.append(json.dumps({"prompt": prompt, "answer": str(a + b)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_serve_run_with_own_model_tasks_and_a_remote_expert(
    start_service: Callable[..., Any], tmp_path: Path
) -> None:
    model, tasks, config = tmp_path / "model", tmp_path / "tasks.jsonl", tmp_path / "my.toml"
    shutil.copytree(reference_path("policy"), model)
    write_tasks(tasks)
    config.write_text(CONFIG.format(model=model, tasks=tasks), encoding="utf-8")
    # `serve run` has no flag for the port: it listens on Serve's default, 8000.
    service = start_service(
        command=["serve", "run", "apps.mentor:build_app", f"config={config}"], port=8000
    )
    service.wait_for_step(2)
    ((sources,),) = service.query("select count(*) from tasks where source not like 'jsonl%'")
    assert sources == 0
    # Groups of version 0 have gamma = 999, which opens no gate.
    gated = "select coalesce(sum(num_gated), 0) from trajectories where kind = 'mixed'"
    service.wait_for(lambda: service.query(gated)[0][0] > 20, "answers of the remote expert")
    ((lost,),) = service.query("select count(*) from trajectories where expert_lost")
    assert lost == 0
    step = service.step()
    assert service.kill_process("Expert") == 1
    service.wait_for_step(step + 3)
    client = openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="unused")
    reply = client.completions.create(model="expert", prompt="1 + 1 =", max_tokens=4)
    assert reply.choices
    service.interrupt(signal.SIGINT)
    ((leased,),) = service.query("select count(*) from rollout_groups where status = 'leased'")
    assert leased == 0, "the learner was let finish"
