import struct
import threading

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mentor_serve.errors import StoreError
from mentor_serve.store.encoding import MAX_COMPRESSED_LENGTH, decode, encode

DTYPES = (np.int32, np.float32, np.uint8)
INT32, FLOAT32, UINT8 = 1, 2, 3
EVERY_VALUE, CONSTANT, COMPRESSED, PLANES = range(4)
NAN_WITH_PAYLOAD = np.array([0x7FC01234], np.uint32).view(np.float32)[0]


def form(data):
    return data[2]


def handmade(*, version=2, dtype=FLOAT32, form=COMPRESSED, num_raw=0, length, body):
    return struct.pack("<BBBBI", version, dtype, form, num_raw, length) + body


def token_ids(length=256):
    return np.random.default_rng(0).integers(0, 300, length).astype(np.int32)


def entropies(length=256):
    return np.random.default_rng(1).exponential(0.3, length).astype(np.float32)


def mostly_nan(length=256):
    values = np.full(length, NAN_WITH_PAYLOAD)
    values[::7] = -entropies(len(values[::7]))
    return values


@given(st.binary(max_size=200), st.sampled_from(DTYPES))
def test_round_trip_keeps_every_bit(raw, dtype):
    size = np.dtype(dtype).itemsize
    array = np.frombuffer(raw[: len(raw) // size * size], dtype)
    decoded = decode(encode(array))
    assert decoded.dtype == array.dtype
    assert decoded.tobytes() == array.tobytes()


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, st.integers(0, 600))))
def test_round_trip_of_arrays_that_repeat_themselves(array):
    # Hypothesis fills most of an array with one value, which is what compressed forms are for.
    decoded = decode(encode(array))
    assert decoded.dtype == array.dtype
    assert decoded.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("array", "expected_form", "at_most"),
    [
        (token_ids(), PLANES, 1.5),
        (entropies(), PLANES, 3.6),
        (mostly_nan(), COMPRESSED, 1.0),
        (np.repeat(np.array([0, 2, 1], np.uint8), [100, 1, 155]), COMPRESSED, 0.2),
    ],
)
def test_what_rollouts_hold_gets_smaller(array, expected_form, at_most):
    data = encode(array)
    assert form(data) == expected_form
    assert len(data) / len(array) < at_most
    assert decode(data).tobytes() == array.tobytes()


def test_noise_is_stored_as_it_is():
    array = np.random.default_rng(0).integers(0, 2**32, 300, np.uint32).view(np.int32)
    data = encode(array)
    assert form(data) == EVERY_VALUE
    assert len(data) == 8 + array.nbytes


def test_bytes_of_every_form_are_read_for_ever():
    looked = np.full(64, np.nan, np.float32)
    looked[5] = -1.25
    replaced = np.zeros(100, np.uint8)
    replaced[3] = 2
    rising = (np.arange(40) * 0.37).astype(np.float32)
    for frozen, expected in (
        ("01020000030000000000c03f000020c00000c07f", np.array([1.5, -2.5, np.nan], np.float32)),
        ("010101000400000007000000", np.full(4, 7, np.int32)),
        ("020202004000000028b52ffd6000008d0000300000c07fa0bf03005340819b1ede7344", looked),
        ("020302006400000028b52ffd20645d000028000000020001003c012d", replaced),
        (
            "020103001800000028b52ffd2060fd0000c800070e151c232a31060d141b222930050c131a21282f040b"
            "000100110ac6",
            np.arange(24, dtype=np.int32) * 7 % 50,
        ),
        (
            "020203032800000000a4a47ba4cd7b8fa4b8cd717b858f9aa4aeb8c3cdd771f67b00850a8f149a1fa429"
            "ae33b83dc3480070701470cc14c2701ecc3d14ebc29970471ef5cca33d281400ebd7c2ae9985705c4733"
            "1e0af5e100bd3d8ebdec0e253d556c828e99a5b1bdc9d5e0ecf802080e14191f252b31373d43494f555b"
            "606628b52ffd202885000040003e3f3f3f3f4041020060161d3002",
            rising,
        ),
    ):
        decoded = decode(bytes.fromhex(frozen))
        assert decoded.dtype == expected.dtype
        assert decoded.tobytes() == expected.tobytes(), frozen


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


def test_plain_numpy_reads_form_0():
    array = np.array([1.5, -2.5, 3.0], np.float32)
    np.testing.assert_array_equal(np.frombuffer(encode(array), "<f4", offset=8), array)


@pytest.mark.parametrize(
    "array", [np.arange(3, dtype=np.int32), np.ones(9, np.float32), token_ids(), mostly_nan()]
)
def test_decoded_arrays_can_be_changed(array):
    decoded = decode(encode(array))
    decoded[0] = 9
    assert decoded[0] == 9
    assert decoded[1:].tobytes() == array[1:].tobytes()


def test_a_memoryview_is_decoded_too():
    # What psycopg hands out in binary mode.
    assert decode(memoryview(encode(token_ids()))).tobytes() == token_ids().tobytes()


def test_threads_do_not_share_a_compressor():
    wrong = []

    def go_round(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            array = rng.integers(0, 300, 200).astype(np.int32)
            if decode(encode(array)).tobytes() != array.tobytes():
                wrong.append(seed)

    threads = [threading.Thread(target=go_round, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


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
        (lambda data: b"\x03" + data[1:], "format 3.*written by a newer mentor-serve"),
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


@pytest.mark.parametrize("array", [token_ids(), mostly_nan()])
def test_damage_to_what_is_compressed_is_noticed(array):
    data = encode(array)
    for damaged in (
        data[:-1],
        data[:20],
        data + b"\x00",
        data[:4] + struct.pack("<I", len(array) + 1) + data[8:],
        data[:4] + struct.pack("<I", 0) + data[8:],
    ):
        with pytest.raises(StoreError, match="damaged"):
            decode(damaged)


def test_no_damaged_byte_ends_in_a_traceback():
    data = encode(token_ids())
    outcomes = {"damaged": 0, "values": 0}
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        # Frames carry no checksum: a changed byte of the literals is another value.
        try:
            decode(bytes(damaged))
        except StoreError:
            outcomes["damaged"] += 1
        else:
            outcomes["values"] += 1
    assert outcomes["damaged"] > 8
    assert sum(outcomes.values()) == len(data)


def test_raw_planes_beyond_the_type_are_refused():
    with pytest.raises(StoreError, match="fewer than 4 raw planes"):
        decode(handmade(form=PLANES, num_raw=4, length=1, body=b"1234"))


@pytest.mark.parametrize("some_form", [CONSTANT, COMPRESSED, PLANES])
def test_a_length_that_nobody_writes_is_refused_before_anything_is_allocated(some_form):
    version = 1 if some_form == CONSTANT else 2
    bomb = handmade(version=version, form=some_form, length=2**32 - 1, body=bytes(4))
    with pytest.raises(StoreError, match=f"at most {MAX_COMPRESSED_LENGTH} values"):
        decode(bomb)


@pytest.mark.parametrize("says_its_size", [True, False])
@pytest.mark.parametrize("some_form", [COMPRESSED, PLANES])
def test_a_frame_that_unpacks_to_more_than_the_header_says_is_refused(some_form, says_its_size):
    compressor = zstandard.ZstdCompressor(write_content_size=says_its_size)
    frame = compressor.compress(bytes(2**26))
    with pytest.raises(StoreError, match="damaged"):
        decode(handmade(form=some_form, length=10, body=frame))


def test_longer_arrays_than_may_be_compressed_are_stored_as_they_are():
    array = np.zeros(MAX_COMPRESSED_LENGTH + 1, np.uint8)
    data = encode(array)
    assert form(data) == EVERY_VALUE
    assert len(decode(data)) == len(array)
