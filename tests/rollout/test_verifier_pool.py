import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mentor_serve.errors import ConfigError, VerifierError
from mentor_serve.rollout.verifiers import VerifierPool
from mentor_serve.types import Score, Task

TASK = Task(source="test", prompt="?", answer="2")
RIGHT = r"<think>1 + 1</think>\boxed{2}"
MISBEHAVE = "sample_rewards:misbehave"


def judge(
    responses: list[str], *, verifier: str = MISBEHAVE, **options: Any
) -> tuple[list[Score | VerifierError], VerifierPool]:
    async def run() -> tuple[list[Score | VerifierError], VerifierPool]:
        async with VerifierPool(verifier, **options) as pool:
            return await pool.score_batch([(TASK, text) for text in responses]), pool

    return asyncio.run(run())


def rewards(outcomes: list[Score | VerifierError]) -> list[float | None]:
    return [outcome.reward if isinstance(outcome, Score) else None for outcome in outcomes]


def test_outcomes_come_in_the_order_of_the_responses_from_several_processes() -> None:
    responses = ["a" * length for length in range(8)]
    outcomes, pool = judge(responses, verifier="sample_rewards:length_reward", num_workers=2)
    assert rewards(outcomes) == [length / 10 for length in range(8)]
    assert pool.stats.num_scored == 8


def test_math_verify_works_with_its_alarm_in_the_worker() -> None:
    outcomes, _ = judge([RIGHT, RIGHT.replace("2", "3")], verifier="math")
    assert rewards(outcomes) == [1.0, 0.1]


def test_what_a_verifier_prints_does_not_disturb_the_answers() -> None:
    outcomes, _ = judge(["2", "3"], verifier="sample_rewards:exact")
    assert rewards(outcomes) == [1.0, 0.0]


@pytest.mark.parametrize("hanging", ["sleep", "spin in C"])
def test_a_verifier_that_hangs_fails_its_response_alone(hanging: str) -> None:
    started = time.monotonic()
    outcomes, pool = judge(["fine", hanging, "fine"], timeout_s=0.5)
    assert rewards(outcomes) == [1.0, None, 1.0]
    assert "ran out of time while judging" in str(outcomes[1])
    assert pool.stats.num_workers_replaced == 1
    assert pool.stats.num_errors == 1
    assert time.monotonic() - started < 30


def test_a_verifier_that_raises_fails_its_response_alone_and_keeps_its_process() -> None:
    outcomes, pool = judge(["raise", "fine"])
    assert rewards(outcomes) == [None, 1.0]
    assert str(outcomes[0]) == "KeyError: 'no such thing'"
    assert pool.stats.num_workers_replaced == 0


def test_a_process_that_dies_is_replaced() -> None:
    outcomes, pool = judge(["fine", "die", "die", "fine"])
    assert rewards(outcomes) == [1.0, None, None, 1.0]
    assert "died while judging the response (exit code 3)" in str(outcomes[1])
    assert pool.stats.num_workers_replaced == 2


def test_a_verifier_cannot_take_all_memory() -> None:
    outcomes, _ = judge(["exhaust memory", "fine"])
    assert rewards(outcomes) == [None, 1.0]
    assert "MemoryError" in str(outcomes[0])


def test_a_killed_process_is_replaced_at_the_next_batch() -> None:
    async def run() -> list[float | None]:
        async with VerifierPool(MISBEHAVE) as pool:
            process = pool._workers[0]._process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
            return rewards(await pool.score_batch([(TASK, "fine")]))

    assert asyncio.run(run()) == [1.0]


def test_a_cancelled_batch_leaves_the_pool_usable() -> None:
    async def run() -> list[float | None]:
        async with VerifierPool(MISBEHAVE, timeout_s=30) as pool:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.score_batch([(TASK, "sleep")]), 0.5)
            return rewards(await pool.score_batch([(TASK, "fine")]))

    assert asyncio.run(run()) == [1.0]


def test_batches_of_many_callers_share_the_processes() -> None:
    async def run() -> list[list[float | None]]:
        async with VerifierPool("sample_rewards:length_reward", num_workers=2) as pool:
            batches = [[(TASK, "a" * size)] * 3 for size in range(6)]
            return [
                rewards(outcomes)
                for outcomes in await asyncio.gather(*map(pool.score_batch, batches))
            ]

    assert asyncio.run(run()) == [[size / 10] * 3 for size in range(6)]


def test_an_empty_batch_has_no_outcomes() -> None:
    outcomes, _ = judge([])
    assert outcomes == []


def test_metadata_that_is_no_json_fails_the_responses() -> None:
    async def run() -> list[Score | VerifierError]:
        async with VerifierPool(MISBEHAVE) as pool:
            task = Task(source="test", prompt="?", answer="2", metadata={"key": object()})
            return await pool.score_batch([(task, "fine")] * 2)

    outcomes = asyncio.run(run())
    assert rewards(outcomes) == [None, None]
    assert "JSON-serialisable" in str(outcomes[0])


@pytest.mark.parametrize(
    "call",
    [lambda pool: pool.start(), lambda pool: pool.score_batch([(TASK, "fine")])],
)
def test_a_function_that_cannot_be_imported_is_a_config_error(
    call: Callable[[VerifierPool], Awaitable[object]],
) -> None:
    async def run() -> None:
        pool = VerifierPool("no_such_module:function")
        try:
            await call(pool)
        finally:
            await pool.close()

    with pytest.raises(ConfigError, match="no_such_module"):
        asyncio.run(run())


def test_a_pool_needs_a_process() -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        VerifierPool(num_workers=0)


def test_workers_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys, mentor_serve.rollout.verifiers.worker as worker\n"
        "from mentor_serve.rollout.verifiers.base import VerifierSpec, build_verifier\n"
        "build_verifier(VerifierSpec())\n"
        "import json; print(json.dumps([m for m in ('torch', 'ray', 'sqlalchemy', 'transformers')"
        " if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == []


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, os\n"
        "from mentor_serve.rollout.verifiers import VerifierPool\n"
        "async def main():\n"
        "    pool = VerifierPool('math')\n"
        "    await pool.start()\n"
        "    print(pool._workers[0]._process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        worker_pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if not is_alive(worker_pid):
            return
        time.sleep(0.1)
    os.kill(worker_pid, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by ten seconds")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}
