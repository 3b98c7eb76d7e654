"""Arrays as bytes: the format of the columns of `trajectory_tokens`.

One-dimensional arrays of int32, float32 or uint8, bit for bit, NaN included. Layout, little-endian:

    offset 0  uint8   format version, 1
    offset 1  uint8   dtype: 1 int32, 2 float32, 3 uint8
    offset 2  uint8   form: 0 every value, 1 one value that stands for all
    offset 3  uint8   0
    offset 4  uint32  number of values
    offset 8          the values

Form 1 makes what is constant free: the weights and sources of on-policy rollouts, the versions of
nearly every rollout. Nothing else is compressed, so that plain numpy reads form 0:
`numpy.frombuffer(blob, "<f4", offset=8)`.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mentor_serve.errors import StoreError

FORMAT_VERSION = 1
_HEADER = struct.Struct("<BBBBI")
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<i4"),
    2: np.dtype("<f4"),
    3: np.dtype("u1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_EVERY_VALUE = 0
_CONSTANT = 1


def encode(array: NDArray[Any]) -> bytes:
    """Bytes of a one-dimensional array of int32, float32 or uint8.

    Raises:
        StoreError: another shape or dtype; nothing is converted, so that nothing is lost silently.
    """
    code = _CODES.get(array.dtype.newbyteorder("<"))
    if array.ndim != 1 or code is None:
        raise StoreError(
            "expected a one-dimensional array of int32, float32 or uint8, got "
            f"{array.dtype} of shape {array.shape}; convert it before storing"
        )
    values = np.ascontiguousarray(array, dtype=_DTYPES[code])
    # Compared as bytes: NaN equals itself, and -0.0 is not 0.0.
    rows = values.view(np.uint8).reshape(len(values), values.itemsize)
    if len(values) > 1 and bool((rows == rows[0]).all()):
        header = _HEADER.pack(FORMAT_VERSION, code, _CONSTANT, 0, len(values))
        return header + values[:1].tobytes()
    return _HEADER.pack(FORMAT_VERSION, code, _EVERY_VALUE, 0, len(values)) + values.tobytes()


def decode(data: bytes) -> NDArray[Any]:
    """The array that `encode` was given; writable, in native byte order.

    Raises:
        StoreError: written by a newer version of the format, or damaged.
    """
    if len(data) < _HEADER.size:
        raise StoreError(f"expected an encoded array of at least 8 bytes, got {len(data)}")
    version, code, form, _, length = _HEADER.unpack_from(data)
    if version != FORMAT_VERSION or code not in _DTYPES or form not in (_EVERY_VALUE, _CONSTANT):
        raise StoreError(
            f"expected an encoded array of format {FORMAT_VERSION}, got format {version}, dtype "
            f"{code}, form {form}: written by a newer mentor-serve, or damaged"
        )
    dtype = _DTYPES[code]
    num_stored = 1 if form == _CONSTANT else length
    if len(data) != _HEADER.size + num_stored * dtype.itemsize:
        raise StoreError(
            f"expected {num_stored} values of {dtype} after the header, got "
            f"{len(data) - _HEADER.size} bytes: the array is damaged"
        )
    stored = np.frombuffer(data, dtype, offset=_HEADER.size).astype(dtype.newbyteorder("="))
    if form == _CONSTANT:
        # np.full through a float would not keep the bits of a NaN; repeat copies them.
        return np.repeat(stored, length)
    return stored
