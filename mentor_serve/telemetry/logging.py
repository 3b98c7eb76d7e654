"""One log stream for the whole process: structlog's and the standard library's records alike.

Modules log through `logging.getLogger(__name__)` or `structlog.get_logger()`; both end in the same
lines. `bind_context(run_id=..., policy_version=...)` adds fields to every later record of the
same thread or task. Standard output stays free for the output of commands: logs go to standard
error and, where asked for, to a file that is always JSON.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path
from typing import Any, Literal

import structlog
from structlog.types import Processor

from mentor_serve.errors import ConfigError

LogFormat = Literal["console", "json"]

MAX_FILE_BYTES = 20_000_000
NUM_OLD_FILES = 3
_NOISY = ("httpx", "httpcore", "urllib3", "filelock", "fsspec")


def configure_logging(
    level: str = "INFO", format: LogFormat = "console", file: Path | None = None
) -> None:
    """Set up logging for this process; a later call replaces the former.

    Args:
        level: DEBUG, INFO, WARNING or ERROR.
        format: `console` for people, `json` (one object a line) for programs.
        file: also write JSON lines there, rotated at 20 MB; its directory is made.

    Raises:
        ConfigError: an unknown level or format, or a file that cannot be written.
    """
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"log level: expected DEBUG, INFO, WARNING or ERROR, got {level!r}")
    if format not in ("console", "json"):
        raise ConfigError(f"log format: expected console or json, got {format!r}")
    structlog.configure(
        processors=[*_shared(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        # A cached logger would keep a former set-up after a second call.
        cache_logger_on_first_use=False,
    )
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setFormatter(_formatter(format))
    if file is not None:
        handlers.append(_file_handler(file))
    _replace_root_handlers(handlers)
    logging.getLogger().setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel("WARNING")
    logging.captureWarnings(True)


def bind_context(**fields: Any) -> None:
    """Add fields to every later record of this thread or task."""
    structlog.contextvars.bind_contextvars(**fields)


def clear_context() -> None:
    """Forget the fields of `bind_context`."""
    structlog.contextvars.clear_contextvars()


def _shared() -> list[Processor]:
    """What every record goes through, whichever library it came from."""
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _file_handler(file: Path) -> logging.Handler:
    _check_writable(file)
    handler = logging.handlers.RotatingFileHandler(
        file, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8"
    )
    handler.setFormatter(_formatter("json"))
    return handler


def _replace_root_handlers(handlers: list[logging.Handler]) -> None:
    """Put ours in the place of the root's, as `logging.config.dictConfig` would, which also closes
    every other handler of the process: absl's then closes the standard error it was made with."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        if isinstance(handler, logging.FileHandler):
            handler.close()
    for handler in handlers:
        root.addHandler(handler)


def _formatter(format: LogFormat) -> logging.Formatter:
    rendering: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if format == "json":
        rendering += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        rendering.append(
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                # The default prints local variables, which may hold secrets.
                exception_formatter=structlog.dev.plain_traceback,
            )
        )
    return structlog.stdlib.ProcessorFormatter(
        processors=rendering,
        # Records of the standard library skip structlog's own chain.
        foreign_pre_chain=[*_shared(), structlog.stdlib.ExtraAdder()],
    )


def _check_writable(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(
            f"log file {file}: expected a file that can be written, got: {error.strerror}"
        ) from error
