"""Versioned directories (`v000012`) that appear whole or not at all.

A directory is filled under a temporary name beside its final one, synced to the disk file by file,
and renamed; it is removed by renaming it away first. So a directory under its final name is
complete whenever the process or the machine died. One writer at a time a parent directory.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mentor_serve.errors import WeightsError

_NAME = re.compile(r"v(\d{6,})")
_TEMPORARY_PREFIX = ".tmp-"


def directory_name(version: int) -> str:
    """Name of a version's directory: 12 gives `v000012`."""
    if version < 0:
        raise ValueError(f"version: expected a number >= 0, got {version}")
    return f"v{version:06d}"


def versions_in(parent: Path) -> dict[int, Path]:
    """Version -> directory for every complete directory under `parent`, oldest first."""
    if not parent.is_dir():
        return {}
    found = {}
    for path in parent.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `path` when the block ends well.

    On an exception the temporary directory is removed and `path` never appears.

    Raises:
        WeightsError: `path` exists already: versions are never overwritten.
    """
    if path.exists():
        raise WeightsError(
            f"expected no {path.name} in {path.parent} yet, but it exists: versions are never "
            "overwritten; is another learner writing there?"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{path.name}-", dir=path.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp gives 0700, and servers may run as another user
        _sync_tree(staging)
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync(path.parent)


def remove_directory(path: Path) -> None:
    """Remove `path` so that a crash leaves it whole or under a temporary name."""
    doomed = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}gone-", dir=path.parent))
    path.rename(doomed / path.name)
    shutil.rmtree(doomed)


def remove_temporary(parent: Path) -> int:
    """Remove what a crashed writer left under temporary names; returns how many."""
    leftovers = list(parent.glob(f"{_TEMPORARY_PREFIX}*")) if parent.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path)
    return len(leftovers)


def prune(parent: Path, *, keep: int, protect: Collection[int] = ()) -> list[int]:
    """Remove all but the newest `keep` versions and the protected ones; returns what went.

    Raises:
        ValueError: `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    found = versions_in(parent)
    doomed = [version for version in list(found)[:-keep] if version not in protect]
    for version in doomed:
        remove_directory(found[version])
    return doomed


def discard_newer(parent: Path, version: int) -> list[int]:
    """Remove every version above `version` and all temporary leftovers; returns what went."""
    remove_temporary(parent)
    doomed = [other for other in versions_in(parent) if other > version]
    for other in doomed:
        remove_directory(parent / directory_name(other))
    return doomed


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
