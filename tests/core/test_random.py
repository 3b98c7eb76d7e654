"""Counter-based uniforms: known answers, statistics, independence of the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mentor_serve.core.random import derived_seeds, philox4x32, uniforms

INT64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def words(*values):
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(words(*counter), words(*key))) == expected


def test_the_first_uniform_is_the_top_53_bits_of_two_words():
    # 0x6627e8d5 >> 5 = 53559110, 0xe169c58d >> 6 = 59098902:
    # (53559110 * 2**26 + 59098902) / 2**53 = 0.399046...
    zero = torch.zeros(1, dtype=torch.int64)
    expected = ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    assert uniforms(zero, zero, zero, 0).item() == expected
    assert expected == pytest.approx(0.399046, abs=1e-6)


@given(seed=INT64, sample=st.integers(0, 2**31), position=st.integers(0, 2**31))
def test_uniforms_lie_in_the_half_open_unit_interval(seed, sample, position):
    drawn = uniforms(*words(seed, sample, position), torch.arange(4))
    assert drawn.dtype == torch.float64
    assert bool(((drawn >= 0) & (drawn < 1)).all())


@given(seeds=st.lists(INT64, min_size=2, max_size=5), stream=st.integers(0, 9))
def test_a_draw_does_not_depend_on_the_rest_of_the_batch(seeds, stream):
    seeds_B = torch.tensor(seeds)
    positions = torch.arange(len(seeds))
    together = uniforms(seeds_B, positions, positions, stream)
    alone = [
        uniforms(seeds_B[i : i + 1], positions[i : i + 1], positions[i : i + 1], stream).item()
        for i in range(len(seeds))
    ]
    assert together.tolist() == alone


def test_every_argument_changes_the_draw():
    base = (7, 0, 0, 0)
    drawn = set()
    for changed in (base, (8, 0, 0, 0), (7, 1, 0, 0), (7, 0, 1, 0), (7, 0, 0, 1)):
        *counters, stream = changed
        drawn.add(uniforms(*words(*counters), stream).item())
    drawn.add(uniforms(*words(7 + 2**32, 0, 0), 0).item())
    assert len(drawn) == 6


def test_uniforms_have_the_moments_of_a_uniform():
    count = 100_000
    drawn = uniforms(torch.full((count,), 3), torch.zeros(count), torch.arange(count), 0)
    # Standard errors: mean 9.1e-4, variance about 2.4e-4; five of them.
    assert abs(drawn.mean().item() - 1 / 2) < 5 * 9.2e-4
    assert abs(drawn.var().item() - 1 / 12) < 5 * 2.4e-4


def test_derived_seeds_are_distinct_and_not_negative():
    count = 10_000
    seeds = derived_seeds(torch.zeros(count), torch.zeros(count), torch.arange(count), 4)
    assert int(seeds.min()) >= 0
    assert len(set(seeds.tolist())) == count
