"""What processes share: logging, threads, the state directory, and the store of their run."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from mentor_serve.errors import ConfigError, WeightsError
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore, VersionRecord, require_current, upgrade
from mentor_serve.telemetry.logging import configure_logging
from mentor_serve.weights import read_manifest, snapshot_path
from mentor_serve.weights.snapshots import WEIGHTS, verify_file


def enter_process(settings: Settings, *, role: str, num_threads: int | None = None) -> None:
    """Set up logging under the state directory and bound torch's threads.

    `num_threads` None leaves torch alone (and unimported), 0 keeps its own choice.
    """
    configure_logging(
        settings.telemetry.log_level,
        format=settings.telemetry.log_format,
        file=settings.logs_dir / f"{role}.log",
    )
    # Serve logs every request, Alembic every look at the schema at INFO.
    for library in ("ray.serve", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if num_threads:
        import torch

        torch.set_num_threads(num_threads)


def check_state_directory(settings: Settings) -> None:
    """Make the state directory and its folders, and try to write there.

    Raises:
        ConfigError: it cannot be made or written.
    """
    home = settings.home.resolve()
    try:
        for directory in (settings.weights_dir, settings.checkpoints_dir, settings.logs_dir):
            directory.mkdir(parents=True, exist_ok=True)
        # No name: processes that start together must not remove each other's.
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise ConfigError(
            f"state directory {home} must be writable, but: {error.strerror} "
            f"({error.filename}); set MENTOR_SERVE_HOME to a directory of yours"
        ) from error


def prepare_state(settings: Settings) -> None:
    """Make the state directory and bring the database to the code's schema.

    SQLite is upgraded in place, under a lock; PostgreSQL must already be current.

    Raises:
        ConfigError: the state directory cannot be written.
        SchemaOutOfDate: the database is behind (PostgreSQL) or ahead of the code.
        StoreError: the database cannot be reached.
    """
    check_state_directory(settings)
    if settings.database_url.startswith("sqlite"):
        upgrade(settings.database_url)
    else:
        require_current(settings.database_url)


@contextmanager
def owned_state(settings: Settings) -> Iterator[None]:
    """Lock the state directory for this process; the lock dies with it, kill -9 included.

    Raises:
        ConfigError: another service has it.
        SchemaOutOfDate, StoreError: as in `prepare_state`.
    """
    prepare_state(settings)
    path = settings.home.resolve() / "service.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"{settings.home.resolve()} belongs to the service of process {file.read().strip()}"
                "; stop it, or set MENTOR_SERVE_HOME to another directory"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def open_store(settings: Settings, *, mode: Literal["read", "write"] = "write") -> TrajectoryStore:
    """Connect to the store that the settings name."""
    return TrajectoryStore(
        settings.database_url,
        pool_size=settings.store.pool_size,
        timeout_s=settings.store.timeout_s,
        read_only=mode == "read",
    )


def open_run(settings: Settings, store: TrajectoryStore, *, announce: bool = False) -> str:
    """Id of the run that the settings name, made if it is new.

    One process of a start announces it, so that a continued run has one event a start.
    """
    return store.open_run(settings.run_name, settings.model_dump(mode="json"), announce=announce)


def verified_snapshot(settings: Settings, version: VersionRecord) -> Path:
    """The directory of a kept version, its weights checked against the store's hash.

    Raises:
        WeightsError: it is not kept any more, or not what the store says.
    """
    path = snapshot_path(settings.weights_dir, version.version)
    expected = version.sha256 or read_manifest(path).sha256
    try:
        verify_file(path / WEIGHTS, expected)
    except OSError as error:
        raise WeightsError(
            f"expected the snapshot of version {version.version} in {path}, but {error.strerror}: "
            f"weights.keep_versions = {settings.weights.keep_versions}; choose one that "
            "`mentor-serve weights list` shows as kept"
        ) from error
    return path
