"""The files that people deploy with say what the code understands."""

from __future__ import annotations

import importlib
from pathlib import Path

import yaml

from mentor_serve import cli
from mentor_serve.settings import load_settings

REPOSITORY = Path(__file__).resolve().parents[1]


def read_yaml(name: str) -> dict[str, object]:
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def test_compose_starts_things_in_order_and_publishes_on_loopback_only() -> None:
    services = read_yaml("docker-compose.yml")["services"]
    assert set(services) == {"db", "migrate", "service", "dashboard"}
    assert services["migrate"]["depends_on"]["db"]["condition"] == "service_healthy"
    for name in ("service", "dashboard"):
        condition = services[name]["depends_on"]["migrate"]["condition"]
        assert condition == "service_completed_successfully"
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    assert all("healthcheck" in services[name] for name in ("db", "service", "dashboard"))
    assert "ports" not in services["db"]


def test_compose_runs_commands_that_exist() -> None:
    services = read_yaml("docker-compose.yml")["services"]
    commands = {
        command.name or command.callback.__name__ for command in cli.app.registered_commands
    }
    groups = {group.name for group in cli.app.registered_groups}
    for name in ("migrate", "service"):
        program, command = services[name]["command"][:2]
        assert program == "mentor-serve"
        assert command in commands | groups
    script = services["dashboard"]["command"][2]
    assert (REPOSITORY / script).is_file()


def test_serve_deploy_file_is_valid_and_points_at_our_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(read_yaml("apps/production.yaml"))
    (application,) = schema.applications
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    load_settings([REPOSITORY / application.args["config"]])
