"""Packing: nothing lost, nothing seen across sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mentor_serve.core.packing import pack_sequences, plan_rows

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def test_first_fit_by_hand():
    assert plan_rows([3, 4, 2], 5) == [[0, 2], [1]]


def test_a_sequence_longer_than_the_budget_gets_its_own_row():
    assert plan_rows([9, 2, 2], 4) == [[0], [1, 2]]


def test_a_row_by_hand():
    (row,) = pack_sequences([torch.tensor([7, 8]), torch.tensor([9])], 3)
    assert row.input_ids.tolist() == [[7, 8, 9]]
    assert row.position_ids.tolist() == [[0, 1, 0]]
    assert row.sequence_index.tolist() == [0, 0, 1]
    assert row.attention_mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


@given(LENGTHS, st.integers(1, 20))
def test_every_token_occurs_once_within_the_budget(lengths, budget):
    sequences = [torch.arange(length) + 100 * index for index, length in enumerate(lengths)]
    rows = pack_sequences(sequences, budget)
    seen = []
    for row in rows:
        num_tokens = row.input_ids.shape[1]
        assert num_tokens <= budget or len(row.sequence_index.unique()) == 1
        for index in row.sequence_index.unique().tolist():
            inside = row.sequence_index == index
            seen.append(index)
            assert torch.equal(row.input_ids[0, inside], sequences[index])
            assert row.position_ids[0, inside].tolist() == list(range(lengths[index]))
            assert not row.attention_mask[0, 0, inside][:, ~inside].any()
    assert sorted(seen) == list(range(len(lengths)))


def test_a_packed_row_gives_the_logits_of_its_sequences_alone(tiny_llama):
    model = tiny_llama(3)
    sequences = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2]), torch.tensor([6, 5, 3])]
    (row,) = pack_sequences(sequences, 64)
    with torch.no_grad():
        packed = model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            attention_mask=row.attention_mask,
        ).logits[0]
        for index, sequence in enumerate(sequences):
            alone = model(input_ids=sequence[None]).logits[0]
            assert torch.allclose(packed[row.sequence_index == index], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("sequences", "budget"),
    [([torch.zeros(0, dtype=torch.int64)], 4), ([torch.zeros(1, 2)], 4), ([torch.zeros(1)], 0)],
    ids=["empty", "two-dimensional", "no budget"],
)
def test_what_cannot_be_packed_is_refused(sequences, budget):
    with pytest.raises(ValueError, match="expected"):
        pack_sequences(sequences, budget)
