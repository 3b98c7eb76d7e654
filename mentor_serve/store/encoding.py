"""Arrays as bytes: the format of the columns of `trajectory_tokens`.

One-dimensional arrays of int32, float32 or uint8, bit for bit, NaN payloads included. Every blob
describes itself. Layout, little-endian:

    offset 0  uint8   format version: 1 for forms 0 and 1, 2 for forms 2 and 3
    offset 1  uint8   dtype: 1 int32, 2 float32, 3 uint8
    offset 2  uint8   form
    offset 3  uint8   raw planes of form 3, else 0
    offset 4  uint32  number of values
    offset 8          the body

    form 0  every value
    form 1  one value that stands for all
    form 2  every value, in one zstd frame
    form 3  byte planes: the lowest byte of every value, then the next, ...; the raw planes as they
            are, the others in one zstd frame

`encode` takes the smallest. Form 1 makes what is constant free: the weights and sources of
on-policy rollouts, the versions of nearly every rollout. Form 2 suits arrays that are mostly NaN.
In form 3 token ids lose their zero bytes; of float32 only the plane of sign and exponent is
compressed, because bits of a mantissa are noise that would spoil the code of the exponents. An
older mentor-serve refuses forms 2 and 3 by their version, and goes on reading the others. Nothing
carries a checksum: that is the database's business.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from mentor_serve.errors import StoreError

NEWEST_FORMAT = 2
MAX_COMPRESSED_LENGTH = 1 << 24
"""Values in an array of form 1, 2 or 3, far beyond any response: a damaged or hostile header makes
`decode` allocate 64 MiB at most. Longer arrays take form 0, where every value is paid for."""
COMPRESSION_LEVEL = 1
"""Of zstd. Level 9 takes more than twice the time to save 1 %: see benchmarks/token_arrays.py."""

_HEADER = struct.Struct("<BBBBI")
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<i4"),
    2: np.dtype("<f4"),
    3: np.dtype("u1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RAW_PLANES = {1: 0, 2: 3}
"""Dtype to the raw planes of form 3; single bytes have no planes."""

_EVERY_VALUE, _CONSTANT, _COMPRESSED, _PLANES = range(4)
_FORMAT_OF_FORM = {_EVERY_VALUE: 1, _CONSTANT: 1, _COMPRESSED: 2, _PLANES: 2}


class _Codec(threading.local):
    """One compressor and decompressor a thread: to make them costs more than a short array."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_codec = _Codec()


def encode(array: NDArray[Any]) -> bytes:
    """Bytes of a one-dimensional array of int32, float32 or uint8, in the smallest form.

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
    body = values.tobytes()
    form, num_raw = _EVERY_VALUE, 0
    if 1 < len(values) <= MAX_COMPRESSED_LENGTH:
        first = body[: values.itemsize]
        # Compared as bytes: NaN equals itself, and -0.0 is not 0.0.
        if body == first * len(values):
            form, body = _CONSTANT, first
        else:
            form, num_raw, body = _smallest(code, values, body)
    return _HEADER.pack(_FORMAT_OF_FORM[form], code, form, num_raw, len(values)) + body


def _smallest(code: int, values: NDArray[Any], body: bytes) -> tuple[int, int, bytes]:
    """The shortest of forms 0, 2 and 3; where two are equal, the one that is read faster."""
    best = (_EVERY_VALUE, 0, body)
    compress = _codec.compressor.compress
    frame = compress(body)
    if len(frame) < len(best[2]):
        best = (_COMPRESSED, 0, frame)
    if code in _RAW_PLANES:
        num_raw = _RAW_PLANES[code]
        planes = values.view(np.uint8).reshape(len(values), values.itemsize).T.tobytes()
        split = num_raw * len(values)
        if split < len(best[2]):
            packed = planes[:split] + compress(planes[split:])
            if len(packed) < len(best[2]):
                best = (_PLANES, num_raw, packed)
    return best


def decode(data: bytes) -> NDArray[Any]:
    """The array that `encode` was given; writable, in native byte order.

    Raises:
        StoreError: written by a newer version of the format, or damaged.
    """
    if len(data) < _HEADER.size:
        raise StoreError(f"expected an encoded array of at least 8 bytes, got {len(data)}")
    version, code, form, num_raw, length = _HEADER.unpack_from(data)
    if _FORMAT_OF_FORM.get(form) != version or code not in _DTYPES:
        raise StoreError(
            f"expected an encoded array of a format up to {NEWEST_FORMAT}, got format {version}, "
            f"dtype {code}, form {form}: written by a newer mentor-serve, or damaged"
        )
    if form != _EVERY_VALUE and length > MAX_COMPRESSED_LENGTH:
        raise StoreError(
            f"expected at most {MAX_COMPRESSED_LENGTH} values in form {form}, got {length}: the "
            "array is damaged"
        )
    dtype = _DTYPES[code]
    body = memoryview(data)[_HEADER.size :]
    if form == _PLANES:
        stored = _from_planes(body, dtype, length=length, num_raw=num_raw)
    elif form == _COMPRESSED:
        stored = _array(_decompressed(body, length * dtype.itemsize), dtype, length)
    else:
        stored = _array(body, dtype, 1 if form == _CONSTANT else length)
    # A copy in either case: what a buffer backs cannot be written to.
    native = stored.astype(dtype.newbyteorder("="))
    # np.full through a float would not keep the bits of a NaN; repeat copies them.
    return np.repeat(native, length) if form == _CONSTANT else native


def _array(body: bytes | memoryview, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    if len(body) != length * dtype.itemsize:
        raise StoreError(
            f"expected {length} values of {dtype} after the header, got {len(body)} bytes: the "
            "array is damaged"
        )
    return np.frombuffer(body, dtype)


def _from_planes(
    body: memoryview, dtype: np.dtype[Any], *, length: int, num_raw: int
) -> NDArray[Any]:
    num_packed = dtype.itemsize - num_raw
    if num_packed < 1:
        raise StoreError(
            f"expected fewer than {dtype.itemsize} raw planes of {dtype}, got {num_raw}: the array "
            "is damaged"
        )
    split = num_raw * length
    packed = _decompressed(body[split:], num_packed * length)
    planes = np.frombuffer(b"".join((body[:split], packed)), np.uint8)
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, length).T).view(dtype).reshape(-1)


def _decompressed(frame: memoryview, num_bytes: int) -> bytes:
    """The content of a zstd frame, refused before it is unpacked unless it says `num_bytes`."""
    try:
        claimed = zstandard.frame_content_size(frame)
        if claimed == num_bytes:
            return _codec.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise StoreError(f"expected a whole zstd frame, got: {error}: damaged array") from error
    raise StoreError(
        f"expected a zstd frame of {num_bytes} bytes, got one that says {claimed}: the array is "
        "damaged"
    )
