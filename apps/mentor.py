"""The Serve application `mentor`.

    serve run apps.mentor:app                                 # embedded defaults
    serve run apps.mentor:build_app config=my.toml            # a configuration
    serve run apps.mentor:build_app learner.learning_rate=3e-5

`mentor-serve up` starts the same application, with the dashboard beside it.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from mentor_serve.actors.app import build_application
from mentor_serve.actors.lifecycle import drain_on_exit
from mentor_serve.errors import MentorError
from mentor_serve.settings import load_settings


def build_app(args: dict[str, str]) -> serve.Application:
    """The application for `config=PATH[,PATH...]` and dotted settings (`section.key=value`).

    Raises:
        SystemExit: one line that says what is wrong with the configuration.
    """
    overrides: dict[str, Any] = dict(args)
    files = [path for path in overrides.pop("config", "").split(",") if path]
    try:
        settings = load_settings(files, overrides)
        application = build_application(settings)
    except MentorError as error:
        raise SystemExit(f"mentor-serve: {error}") from error
    drain_on_exit(settings)
    return application


def __getattr__(name: str) -> serve.Application:
    # `app` is built on demand, so that importing this module for `build_app` costs nothing.
    if name == "app":
        return build_app({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
