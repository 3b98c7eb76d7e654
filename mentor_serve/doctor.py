"""`mentor-serve doctor`: what this machine and this configuration can and cannot do.

Every check runs for real (it loads the models' configurations, opens the database, binds the
ports) and never raises: a problem is a row that says what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from mentor_serve.errors import MentorError
from mentor_serve.settings import Settings

TESTED_VERSIONS = {"torch": "2.13.", "ray": "2.60.", "transformers": "5.19."}
MIN_FREE_DISK_GB = 2.0
MIN_MEMORY_GB = 4.0


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the report."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str

    def as_dict(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


def run_checks(settings: Settings) -> list[Check]:
    """Every check, in the order in which a start of the service would meet the problem."""
    checks = [_python(), *_packages(), _memory(), *_accelerator()]
    for name, probe in (
        ("state directory", _state),
        ("database", _database),
        ("engine", _engine),
        ("models", _models),
        ("tasks", _tasks),
        ("API port", _api_port),
        ("dashboard port", _dashboard_port),
    ):
        checks.append(_guarded(name, probe, settings))
    return checks


def _guarded(name: str, probe: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check(name, "ok", probe(settings))
    except MentorError as error:
        return Check(name, "fail", str(error))


def _python() -> Check:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Check("python", "ok", version)
    return Check("python", "fail", f"expected 3.11 or 3.12, got {version}")


def _packages() -> Iterator[Check]:
    for package, tested in TESTED_VERSIONS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "fail", f"not installed; expected {tested}x")
            continue
        if version.startswith(tested):
            yield Check(package, "ok", version)
        else:
            yield Check(package, "warn", f"{version}; tested with {tested}x (see constraints.txt)")
    yield _broken_torchvision()


def _broken_torchvision() -> Check:
    """A torchvision built for another torch breaks the import of transformers' model classes."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return Check("torchvision", "ok", "absent, and not needed")
    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return Check(
            "torchvision",
            "fail",
            f"{version} does not fit this torch ({error}); `pip uninstall torchvision torchaudio`",
        )
    return Check("torchvision", "ok", version)


def _memory() -> Check:
    total_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    detail = f"{total_gb:.1f} GiB, {os.cpu_count()} CPUs"
    if total_gb < MIN_MEMORY_GB:
        return Check("memory", "warn", f"{detail}; the embedded default needs {MIN_MEMORY_GB:g}")
    return Check("memory", "ok", detail)


def _accelerator() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield Check("GPU", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    else:
        yield Check("GPU", "ok", "none; the service runs on the CPU")


def _state(settings: Settings) -> str:
    from mentor_serve.actors.runtime import check_state_directory

    check_state_directory(settings)
    free_gb = shutil.disk_usage(settings.home.resolve()).free / 2**30
    note = "" if free_gb >= MIN_FREE_DISK_GB else f" (fewer than {MIN_FREE_DISK_GB:g}: free some)"
    return f"{settings.home.resolve()}, {free_gb:.0f} GiB free{note}"


def _database(settings: Settings) -> str:
    from mentor_serve.store import schema_state

    state = schema_state(settings.database_url)
    if state.status == "ahead" or (
        state.status != "ok" and not settings.database_url.startswith("sqlite")
    ):
        from mentor_serve.store import require_current

        require_current(settings.database_url)
    return f"schema {state.status} (revision {state.current or 'none'}, code {state.head})"


def _engine(settings: Settings) -> str:
    if settings.policy.engine == "torch":
        return "torch"
    from mentor_serve.engines.vllm.cores import check_device, check_installation

    installed = check_installation()
    check_device(settings.policy.device)
    return f"{installed} on {settings.policy.device}"


def _models(settings: Settings) -> str:
    from mentor_serve.models.loading import load_logits_width, load_tokenizer
    from mentor_serve.models.vocabulary import check_models_share_vocabulary

    policy, expert = settings.policy.model, settings.expert.model
    if expert == "none":
        load_tokenizer(policy)
        load_logits_width(policy)
        return f"policy {policy}, no expert (guidance is off)"
    check_models_share_vocabulary(policy, expert)
    width = load_logits_width(policy)
    return f"policy {policy}, expert {expert}, vocabulary {width}"


def _tasks(settings: Settings) -> str:
    from mentor_serve.actors.workload import task_source

    task = task_source(settings).next_task()
    return f"{task.source}, for instance {task.prompt[:60]!r}"


def _api_port(settings: Settings) -> str:
    from mentor_serve.actors.lifecycle import check_port_is_free

    gateway = settings.gateway
    check_port_is_free(gateway.host, gateway.port, setting="gateway.port")
    return f"{gateway.host}:{gateway.port} is free"


def _dashboard_port(settings: Settings) -> str:
    from mentor_serve.actors.lifecycle import check_port_is_free

    port = settings.telemetry.dashboard_port
    check_port_is_free("127.0.0.1", port, setting="telemetry.dashboard_port")
    return f"127.0.0.1:{port} is free"
