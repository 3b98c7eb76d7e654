"""Weight snapshots: one directory a policy version, in the `save_pretrained` layout.

`<weights_dir>/v000012/` holds `model.safetensors`, `config.json`, `generation_config.json`, the
tokenizer's files, and `mentor.json`, the manifest. `AutoModelForCausalLM.from_pretrained` and
`vllm serve` load it as it is. Snapshots are immutable, appear whole or not at all, and are checked
against their SHA-256 when read. Weights are one file, never shards. This module refuses to
overwrite a version; which version is live is the store's knowledge, not this module's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_serve.errors import WeightsError
from mentor_serve.models.progress import no_progress_bar
from mentor_serve.types import Guidance
from mentor_serve.weights.directories import (
    atomic_directory,
    directory_name,
    discard_newer,
    file_sha256,
    prune,
    versions_in,
)

if TYPE_CHECKING:
    # Listings are read in processes that should not pay for importing torch.
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

MANIFEST = "mentor.json"
WEIGHTS = "model.safetensors"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One policy version: its place in the training and, where loaded, its weights."""

    version: int
    step: int
    """Updates made up to this version."""
    alpha: float
    """Weight of mixed rollouts (Eq. 11) in the next update."""
    gamma: float
    """gamma_p that rollouts of this version are sampled with."""
    parent_version: int | None
    sha256: str
    """Of `model.safetensors`."""
    path: Path
    created_at: datetime
    run_id: str | None = None
    """The run that wrote it."""
    state_dict: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    """Weights on the CPU. A tied weight appears once, under the name of the file (so
    `lm_head.weight` is absent where it is the embedding); None in listings."""

    @property
    def guidance(self) -> Guidance:
        """What collectors sample under while this version is live."""
        return Guidance(
            policy_version=self.version, step=self.step, alpha=self.alpha, gamma=self.gamma
        )

    def with_weights(self, state_dict: Mapping[str, Tensor]) -> Snapshot:
        """The same snapshot carrying its weights."""
        return replace(self, state_dict=state_dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotLabel:
    """What the writer says about a version."""

    version: int
    step: int
    alpha: float
    gamma: float
    parent_version: int | None = None
    run_id: str | None = None


def snapshot_path(weights_dir: Path, version: int) -> Path:
    """Directory of a version: `<weights_dir>/v000012`."""
    return weights_dir / directory_name(version)


def write_snapshot(
    weights_dir: Path,
    *,
    label: SnapshotLabel,
    model: PreTrainedModel,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Snapshot:
    """Write `state_dict` in `model`'s architecture and return the snapshot, weights included.

    Args:
        weights_dir: parent directory, made where missing.
        label: version, step and guidance.
        model: gives configuration, generation defaults and file layout; its own weights are not
            read.
        state_dict: the weights, tied ones once or under both names.
        tokenizer: saved beside the weights where given.

    Raises:
        WeightsError: the version exists already.
    """
    path = snapshot_path(weights_dir, label.version)
    created_at = datetime.now(UTC)
    with atomic_directory(path) as staging:
        with no_progress_bar():
            # One file: its hash stands for the version. Shards start far above any single model.
            model.save_pretrained(staging, state_dict=dict(state_dict), max_shard_size="100TB")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        sha256 = file_sha256(staging / WEIGHTS)
        manifest = {
            "format": _FORMAT,
            "version": label.version,
            "step": label.step,
            "alpha": label.alpha,
            "gamma": label.gamma,
            "parent": label.parent_version,
            "sha256": sha256,
            "created_at": created_at.isoformat(),
            "run_id": label.run_id,
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return _snapshot(path, manifest, state_dict)


def read_manifest(path: Path) -> Snapshot:
    """The snapshot of a directory without its weights.

    Raises:
        WeightsError: no snapshot there, or a manifest that cannot be understood.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise WeightsError(
                f"{file}: expected format {_FORMAT}, got {manifest['format']}: written by another "
                "release of mentor-serve"
            )
        return _snapshot(path, manifest, None)
    except OSError as error:
        raise WeightsError(
            f"expected a snapshot in {path}, but its {MANIFEST} cannot be read: {error.strerror}; "
            "choose a version of `mentor-serve weights list`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file} is damaged ({error!r}); remove {path}") from error


def read_snapshot(path: Path, *, verify: bool = True) -> Snapshot:
    """The snapshot of a directory with its weights; `verify` checks the file's hash first.

    Raises:
        WeightsError: missing or damaged; the message names the file and both hashes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    snapshot = read_manifest(path)
    file = path / WEIGHTS
    try:
        if verify:
            verify_file(file, snapshot.sha256)
        state_dict = load_file(file)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error}; use another version") from error
    except SafetensorError as error:
        raise WeightsError(f"{file} is damaged: {error}; use another version") from error
    return snapshot.with_weights(state_dict)


def verify_file(file: Path, sha256: str) -> None:
    """Compare a file with its recorded hash.

    Raises:
        WeightsError: they differ.
    """
    found = file_sha256(file)
    if found != sha256:
        raise WeightsError(
            f"{file} is damaged: expected sha256 {sha256}, got {found}; use another version"
        )


def list_snapshots(weights_dir: Path) -> list[Snapshot]:
    """All snapshots under a directory, oldest first, without weights.

    One whose manifest is damaged is left out with a warning, so that one bad directory does not
    hide the others.
    """
    snapshots = []
    for path in versions_in(weights_dir).values():
        try:
            snapshots.append(read_manifest(path))
        except WeightsError as error:
            _log.warning("left out of the list of snapshots: %s", error)
    return snapshots


def prune_snapshots(weights_dir: Path, *, keep: int, protect: Collection[int] = ()) -> list[int]:
    """Remove all but the newest `keep` versions and those in `protect`; returns what went."""
    return prune(weights_dir, keep=keep, protect=protect)


def discard_after(weights_dir: Path, version: int) -> list[int]:
    """Remove versions above `version`, which a crashed writer never committed, and its leftovers.

    Returns the versions removed. Only for the one process that writes to this directory.
    """
    return discard_newer(weights_dir, version)


def _snapshot(
    path: Path, manifest: Mapping[str, Any], state_dict: Mapping[str, Tensor] | None
) -> Snapshot:
    return Snapshot(
        version=int(manifest["version"]),
        step=int(manifest["step"]),
        alpha=float(manifest["alpha"]),
        gamma=float(manifest["gamma"]),
        parent_version=None if manifest["parent"] is None else int(manifest["parent"]),
        sha256=str(manifest["sha256"]),
        path=path,
        created_at=datetime.fromisoformat(manifest["created_at"]),
        run_id=manifest["run_id"],
        state_dict=state_dict,
    )
