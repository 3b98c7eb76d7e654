import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mentor_serve.errors import StoreError
from mentor_serve.store.encoding import decode, encode

DTYPES = (np.int32, np.float32, np.uint8)


@given(st.binary(max_size=200), st.sampled_from(DTYPES))
def test_round_trip_keeps_every_bit(raw, dtype):
    size = np.dtype(dtype).itemsize
    array = np.frombuffer(raw[: len(raw) // size * size], dtype)
    decoded = decode(encode(array))
    assert decoded.dtype == array.dtype
    assert decoded.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 1000])
def test_constant_arrays_take_one_value(dtype, length):
    array = np.full(length, 3, dtype)
    data = encode(array)
    assert len(data) == 8 + array.itemsize
    np.testing.assert_array_equal(decode(data), array)


def test_a_run_of_nan_is_constant_and_keeps_its_payload():
    array = np.full(50, 0x7FC01234, np.uint32).view(np.float32)
    data = encode(array)
    assert len(data) == 12
    assert decode(data).tobytes() == array.tobytes()


def test_negative_zero_is_not_zero():
    array = np.array([0.0, -0.0], np.float32)
    assert np.signbit(decode(encode(array))).tolist() == [False, True]


def test_plain_numpy_reads_what_is_not_constant():
    array = np.array([1.5, -2.5, 3.0], np.float32)
    np.testing.assert_array_equal(np.frombuffer(encode(array), "<f4", offset=8), array)


def test_decoded_arrays_can_be_changed():
    decoded = decode(encode(np.arange(3, dtype=np.int32)))
    decoded[0] = 9
    assert decoded.tolist() == [9, 1, 2]


def test_big_endian_arrays_are_read_back_as_native():
    decoded = decode(encode(np.array([1, 2], ">i4")))
    assert decoded.tolist() == [1, 2]
    assert decoded.dtype == np.int32


@pytest.mark.parametrize(
    "array", [np.zeros(2, np.int64), np.zeros(2, np.float64), np.zeros((2, 2), np.int32)]
)
def test_what_would_lose_something_is_refused(array):
    with pytest.raises(StoreError, match="one-dimensional array of int32, float32 or uint8"):
        encode(array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:4], "at least 8 bytes"),
        (lambda data: b"\x02" + data[1:], "format 2"),
        (lambda data: data[:1] + b"\x09" + data[2:], "dtype 9"),
        (lambda data: data[:2] + b"\x07" + data[3:], "form 7"),
        (lambda data: data[:-1], "damaged"),
        (lambda data: data + b"\x00", "damaged"),
    ],
)
def test_damage_is_noticed(damage, message):
    data = encode(np.arange(5, dtype=np.int32))
    with pytest.raises(StoreError, match=message):
        decode(damage(data))
