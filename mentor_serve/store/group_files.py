"""A group as one file: what waits on disk while the database is away, and what it refused.

Layout, little-endian; nothing is pickled:

    offset 0   8 bytes   `MSGROUP` and the version of the format, 1
    offset 8   16 bytes  BLAKE2b of everything behind it
    offset 24  uint32    length of the header
    offset 28            the header: JSON, ASCII
    ...                  the arrays, one behind the other, as the header lists them

What the database does not keep of a rollout (`top_logprobs`, `prompt_logprobs`) is not kept here.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mentor_serve.errors import StoreError
from mentor_serve.store.group_rows import ARRAY_COLUMNS
from mentor_serve.store.records import NewGroup, NewTrajectory
from mentor_serve.types import (
    Guidance,
    GuidanceMethod,
    Intervention,
    Rollout,
    Score,
    StopReason,
    Task,
    TrajectoryKind,
)

_MAGIC = b"MSGROUP\x01"
_HEAD = struct.Struct("<8s16sI")
_DIGEST_SIZE = 16
_DTYPES = ("int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", "bool")


@dataclass(frozen=True, slots=True, kw_only=True)
class FiledGroup:
    """What a file holds."""

    run_id: str
    created_at: datetime
    group: NewGroup


def encode_group(filed: FiledGroup) -> bytes:
    """The file of a group, whatever is wrong with the group itself.

    Raises:
        StoreError: an array of objects or of a kind that no rollout has.
    """
    arrays = _Arrays()
    document = {
        "run_id": filed.run_id,
        "created_at": filed.created_at.astimezone(UTC).isoformat(),
        "group": _group_document(filed.group, arrays),
        "arrays": arrays.listing,
    }
    header = json.dumps(document, default=_plain).encode("ascii")
    body = b"".join([struct.pack("<I", len(header)), header, *arrays.parts])
    return _MAGIC + _digest(body) + body


def decode_group(data: bytes) -> FiledGroup:
    """What `encode_group` was given.

    Raises:
        StoreError: not such a file, written by a newer version, or damaged.
    """
    if len(data) < _HEAD.size or data[:7] != _MAGIC[:7]:
        raise StoreError(f"expected a file of a group, got {len(data)} bytes of something else")
    magic, digest, length = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise StoreError(
            f"expected a file of format {_MAGIC[7]}, got format {magic[7]}: it was written by a "
            "newer mentor-serve; use that one to read it"
        )
    if _digest(data[24:]) != digest:
        raise StoreError("expected the checksum in the file to be right: the file is damaged")
    try:
        document = json.loads(data[_HEAD.size : _HEAD.size + length])
        arrays = _read_arrays(document["arrays"], memoryview(data)[_HEAD.size + length :])
        return FiledGroup(
            run_id=document["run_id"],
            created_at=datetime.fromisoformat(document["created_at"]),
            group=_group(document["group"], arrays),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise StoreError(
            f"expected a file of a group, but {type(error).__name__}: {error}"
        ) from error


def _digest(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_SIZE).digest()


class _Arrays:
    """Arrays on their way into a file; the same object is written once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.listing: list[list[Any]] = []
        self._known: dict[int, int] = {}
        self._kept: list[Any] = []

    def add(self, values: Any) -> int:
        """The number of the array in the file's list."""
        number = self._known.get(id(values))
        if number is not None:
            return number
        array = np.asarray(values)
        if array.dtype.name not in _DTYPES:
            if array.size:
                raise StoreError(f"expected an array of numbers, got {array.dtype}")
            array = np.empty(0, np.int32)
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        number = len(self.parts)
        self.parts.append(little.tobytes())
        self.listing.append([array.dtype.name, list(array.shape)])
        self._known[id(values)] = number
        self._kept.append(values)  # an id is unique as long as the object lives
        return number


def _read_arrays(listing: list[Any], body: memoryview) -> list[NDArray[Any]]:
    arrays = []
    offset = 0
    for name, shape in listing:
        if name not in _DTYPES:
            raise ValueError(f"array of {name}")
        dtype = np.dtype(name)
        count = int(np.prod(shape, dtype=np.int64))
        stored = np.frombuffer(body, dtype.newbyteorder("<"), count=count, offset=offset)
        arrays.append(stored.astype(dtype).reshape(shape))
        offset += count * dtype.itemsize
    return arrays


def _group_document(group: NewGroup, arrays: _Arrays) -> dict[str, Any]:
    task = asdict(group.task)
    # As the database gets it: the same problem has to be the same task again.
    task["metadata"] = json.dumps(group.task.metadata, default=str)
    return {
        "group_id": group.group_id,
        "task": task,
        "guidance": asdict(group.guidance),
        "trajectories": [_trajectory_document(item, arrays) for item in group.trajectories],
        "status": str(group.status),
        "error": group.error,
        "method": str(group.method),
        "num_hint_tokens": group.num_hint_tokens,
        "hint_fraction": group.hint_fraction,
    }


def _group(document: Mapping[str, Any], arrays: list[NDArray[Any]]) -> NewGroup:
    task = dict(document["task"])
    task["metadata"] = json.loads(task["metadata"])
    return NewGroup(
        **dict(document)
        | {
            "task": Task(**task),
            "guidance": Guidance(**document["guidance"]),
            "method": GuidanceMethod(document["method"]),
            "trajectories": [_trajectory(item, arrays) for item in document["trajectories"]],
        }
    )


def _trajectory_document(item: NewTrajectory, arrays: _Arrays) -> dict[str, Any]:
    return {
        "rollout": None if item.rollout is None else _rollout_document(item.rollout, arrays),
        "kind": str(item.kind),
        "sample_index": item.sample_index,
        "score": None if item.score is None else asdict(item.score),
        "prompt_token_ids": arrays.add(item.prompt_token_ids),
        "text": item.text,
        "seed": item.seed,
        "error": item.error,
        "token_texts": list(item.token_texts.items()),
        "demonstration_id": item.demonstration_id,
        "expert_model": item.expert_model,
    }


def _trajectory(document: Mapping[str, Any], arrays: list[NDArray[Any]]) -> NewTrajectory:
    rollout, score = document["rollout"], document["score"]
    return NewTrajectory(
        **dict(document)
        | {
            "rollout": None if rollout is None else _rollout(rollout, arrays),
            "kind": TrajectoryKind(document["kind"]),
            "score": None if score is None else Score(**score),
            "prompt_token_ids": arrays[document["prompt_token_ids"]],
            "token_texts": dict(document["token_texts"]),
        }
    )


def _rollout_document(rollout: Rollout, arrays: _Arrays) -> dict[str, Any]:
    return {
        "arrays": {name: arrays.add(getattr(rollout, name)) for name in ARRAY_COLUMNS},
        "stop_reason": str(rollout.stop_reason),
        "text": rollout.text,
        "interventions": [asdict(one) for one in rollout.interventions],
        "latency_s": rollout.latency_s,
        "expert_lost": rollout.expert_lost,
    }


def _rollout(document: Mapping[str, Any], arrays: list[NDArray[Any]]) -> Rollout:
    values = dict(document)
    numbers = values.pop("arrays")
    return Rollout(
        **values
        | {name: arrays[number] for name, number in numbers.items()}
        | {
            "stop_reason": StopReason(values["stop_reason"]),
            "interventions": [Intervention(**one) for one in values["interventions"]],
        }
    )


def _plain(value: Any) -> Any:
    """A numpy number as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"expected what JSON can hold, got {type(value).__name__}")
