"""Structured logs: structlog in front, the standard library behind, one format for both.

Libraries that log through `logging` (Ray, uvicorn, transformers) come out in the same lines as our
own events. `console` is for people, `json` is one object a line for programs.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path
from typing import Literal

import structlog

MAX_FILE_BYTES = 20 * 2**20
NUM_OLD_FILES = 3

LogFormat = Literal["console", "json"]


def configure_logging(
    level: str = "INFO", *, format: LogFormat = "console", file: Path | None = None
) -> None:
    """Send every log record to standard error, and to `file` (rotated) where given.

    May be called again; the last call counts.

    Args:
        level: DEBUG, INFO, WARNING or ERROR.
        format: of standard error; the file is always JSON.
        file: its directory is made where missing.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handlers: list[logging.Handler] = [_handler(logging.StreamHandler(sys.stderr), shared, format)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        rotating = logging.handlers.RotatingFileHandler(
            file, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8"
        )
        handlers.append(_handler(rotating, shared, "json"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def _handler(
    handler: logging.Handler, shared: list[structlog.typing.Processor], format: LogFormat
) -> logging.Handler:
    final: list[structlog.typing.Processor]
    if format == "json":
        final = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        final = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    return handler
