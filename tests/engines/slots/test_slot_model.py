"""Key-value slots: any order of reading, decoding, copying and forgetting gives the same logits.

Every test runs on the fused forward and on the Hugging Face forward of other architectures.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import Cache

from mentor_serve.engines.slots import read_plan
from mentor_serve.engines.slots.kv_cache import SlotStorage
from mentor_serve.engines.slots.read_plan import Ragged, passes
from mentor_serve.engines.slots.slot_model import SlotModel
from mentor_serve.errors import EngineError

VOCAB = 29
MAX_TOKENS = 96
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.4,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=MAX_TOKENS,
        initializer_range=0.4, bos_token_id=0, eos_token_id=0,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.4,
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        init_std=0.4,
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def slots(model):
    return SlotModel(model, max_slots=6, max_tokens=MAX_TOKENS)


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def own_logits(model, row):
    return model(input_ids=torch.tensor(np.array(row))[None], use_cache=False).logits[0]


def assert_next(slots, model, rows):
    """Slots 0 .. n-1 hold these rows: decoding one more token gives the model's logits."""
    more = tokens(len(rows), seed=99)
    got = slots.decode(torch.from_numpy(more))
    for row, token, logits in zip(rows, more, got, strict=True):
        torch.testing.assert_close(logits, own_logits(model, [*row, token])[-1], **CLOSE)


def test_only_llamas_are_fused(model, slots):
    assert slots.is_fused == (type(model).__name__ == "LlamaForCausalLM")


def test_read_returns_the_wanted_logits_in_order(model, slots):
    rows = [tokens(length, seed=length) for length in (7, 3, 20, 1)]
    wanted = [[0, 3, 6], [], [19], [0]]
    got = slots.read([5, 1, 0, 3], rows, wanted)
    expected = [own_logits(model, row)[at] for row, at in zip(rows, wanted, strict=True) if at]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.cat(expected), **CLOSE)
    assert slots.lengths.tolist() == [20, 3, 0, 1, 0, 7]
    assert slots.num_tokens_read == 31


def test_reading_on_continues_a_slot(model, slots):
    row, other = tokens(30), tokens(12, seed=1)
    slots.read([2, 0], [row[:11], other[:5]], [[], []])
    got = slots.read([0, 2], [other[5:], row[11:].tolist()], [[6], range(19)])
    expected = torch.cat([own_logits(model, other)[-1:], own_logits(model, row)[11:]])
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize(
    "occupied", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2], [0, 2, 3, 5], [0, 5], [4]]
)
def test_any_set_of_slots_reads_alike(model, slots, occupied):
    rows = [tokens(5 + slot, seed=slot) for slot in occupied]
    slots.read(occupied, [row[:-3] for row in rows], [[]] * len(rows))
    got = slots.read(occupied, [row[-3:-1] for row in rows], [[1]] * len(rows))
    last = slots.read(occupied, [row[-1:] for row in rows], [[0]] * len(rows))
    expected = [own_logits(model, row)[-2:] for row in rows]
    torch.testing.assert_close(torch.stack([got, last], 1), torch.stack(expected), **CLOSE)


def test_long_rows_are_read_in_chunks_and_many_rows_in_passes(model, slots, monkeypatch):
    monkeypatch.setattr(read_plan, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(type(slots._forward), "max_cells", lambda *_: 20)
    rows = [tokens(length, seed=length) for length in (33, 5, 16, 8, 1)]
    wanted = [[0, 7, 8, 30, 32], [4], [], [0, 1, 7], [0]]
    got = slots.read([0, 1, 2, 3, 4], rows, wanted)
    expected = [own_logits(model, row)[at] for row, at in zip(rows, wanted, strict=True) if at]
    torch.testing.assert_close(got, torch.cat(expected), **CLOSE)
    # First chunks (8, 8) (8, 5) (1), second chunks (8, 8), then the longest row's other three.
    assert slots.num_passes == 7
    assert slots.num_tokens_read == sum(map(len, rows))
    assert_next(slots, model, rows)


def test_nothing_wanted_returns_no_rows(model, slots):
    got = slots.read([0, 1], [tokens(4), tokens(2)], [(), []])
    assert got.shape == (0, VOCAB)
    assert_next(slots, model, [tokens(4), tokens(2)])


@pytest.mark.parametrize("model", [name for name in CONFIGS if name != "llama"], indirect=True)
def test_unwanted_tokens_never_reach_the_vocabulary(model, slots):
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:-1]))
    slots.read([0, 1], [tokens(20), tokens(3)], [[19], [0, 2]])
    assert [shape.numel() for shape in seen] == [3]


def test_extend_and_score_are_reads(model, slots):
    rows = [tokens(9), tokens(4, seed=1)]
    got = slots.extend([1, 0], rows)
    expected = [own_logits(model, row)[-1] for row in rows]
    torch.testing.assert_close(got, torch.stack(expected), **CLOSE)
    chunks = slots.score(3, tokens(25), chunk_tokens=10)
    assert [len(chunk) for chunk in chunks] == [10, 10, 5]
    torch.testing.assert_close(torch.cat(chunks), own_logits(model, tokens(25)), **CLOSE)


def test_given_positions_change_nothing(model, slots):
    twin = SlotModel(model, max_slots=6, max_tokens=MAX_TOKENS)
    for one in (slots, twin):
        one.read([0, 1], [tokens(4), tokens(7)], [[], []])
    ids, lengths = torch.tensor([1, 2]), torch.from_numpy(slots.lengths[:2].copy())
    assert torch.equal(slots.decode(ids), twin.decode(ids, lengths))
    assert slots.lengths.tolist() == twin.lengths.tolist() == [5, 8, 0, 0, 0, 0]


def test_rows_that_do_not_take_part_are_left_as_they_were(model, slots):
    rows = [tokens(count, seed=count) for count in (6, 3, 9)]
    slots.read([0, 1, 2], rows, [[]] * 3)
    active = np.array([True, False, True])
    more = tokens((4, 3), seed=5)
    for step in more:
        got = slots.decode(torch.from_numpy(step), active=active)
    assert slots.lengths[:3].tolist() == [10, 3, 13]
    assert slots.num_tokens_read == 18 + 8
    for slot in (0, 2):
        expected = own_logits(model, [*rows[slot], *more[:, slot]])[-1]
        torch.testing.assert_close(got[slot], expected, **CLOSE)
    longer = [[*rows[0], *more[:, 0]], rows[1], [*rows[2], *more[:, 2]]]
    assert_next(slots, model, longer)


def test_an_empty_slot_may_be_a_dummy(model, slots):
    slots.read([1], [tokens(5)], [[]])
    slots.decode(torch.tensor([3, 4]), active=np.array([False, True]))
    assert slots.lengths[:2].tolist() == [0, 6]
    assert_next(slots, model, [[], [*tokens(5), 4]])


def test_a_full_slot_can_wait_but_not_read(model, slots):
    full, row = tokens(MAX_TOKENS), tokens(5, seed=1)
    slots.read([0, 1], [full, row], [[], []])
    ids = torch.tensor([3, 4])
    got = slots.decode(ids, active=np.array([False, True]))
    torch.testing.assert_close(got[1], own_logits(model, [*row, 4])[-1], **CLOSE)
    assert slots.lengths[:2].tolist() == [MAX_TOKENS, 6]
    with pytest.raises(EngineError, match="at most 96 tokens"):
        slots.decode(ids)
    with pytest.raises(EngineError, match="at most 96 tokens"):
        slots.decode(ids, active=np.array([True, True]))
    with pytest.raises(EngineError, match="asked for 97"):
        slots.read([0], [[1]], [[]])
    assert slots.lengths[:2].tolist() == [MAX_TOKENS, 6]
    slots.truncate(0, MAX_TOKENS - 1)
    got = slots.read([0], [full[-1:]], [[0]])
    torch.testing.assert_close(got[0], own_logits(model, full)[-1], **CLOSE)


def test_truncating_and_reading_again_equals_a_fresh_slot(model, slots):
    row, other = tokens(20), tokens(20, seed=1)
    slots.read([0, 1], [row, row], [[], []])
    slots.truncate(0, 7)
    slots.truncate(1, 50)
    assert slots.lengths[:2].tolist() == [7, 20]
    got = slots.read([0], [other[:5]], [[4]])
    torch.testing.assert_close(got[0], own_logits(model, [*row[:7], *other[:5]])[-1], **CLOSE)
    assert_next(slots, model, [[*row[:7], *other[:5]], row])


@pytest.mark.parametrize("targets", [[0], [0, 1, 3, 4, 5]])
def test_copies_go_their_own_ways(model, slots, targets):
    row = tokens(14)
    slots.read([2], [row], [[]])
    slots.copy(2, targets, num_tokens=9)
    assert all(slots.lengths[target] == 9 for target in targets)
    rows = [[*row[:9], *tokens(3, seed=slot)] for slot in targets]
    got = slots.extend(targets, [row[9:] for row in rows])
    expected = [own_logits(model, row)[-1] for row in rows]
    torch.testing.assert_close(got, torch.stack(expected), **CLOSE)
    source = slots.extend([2], [[1]])
    torch.testing.assert_close(source[0], own_logits(model, [*row, 1])[-1], **CLOSE)


@pytest.mark.parametrize(
    ("sources", "targets"),
    [([5], [1]), ([4, 5, 3], [1, 0, 2]), ([5, 4, 3, 2, 1], [4, 3, 2, 1, 0]), ([4, 5], [5, 4])],
)
def test_moved_sequences_read_on(model, slots, sources, targets):
    rows = {slot: tokens(4 + slot, seed=slot) for slot in sources}
    slots.read(sources, list(rows.values()), [[]] * len(rows))
    slots.move(sources, targets)
    for source, target in zip(sources, targets, strict=True):
        assert slots.lengths[target] == 4 + source
        assert source in targets or slots.lengths[source] == 0
    got = slots.extend(targets, [[7]] * len(targets))
    expected = [own_logits(model, [*rows[source], 7])[-1] for source in sources]
    torch.testing.assert_close(got, torch.stack(expected), **CLOSE)
    slots.move([], [])


def test_storage_is_reserved_counted_and_reshaped(model, slots):
    row = tokens(10)
    slots.reserve(2, 32)
    slots.read([0], [row], [[]])
    layers, heads, dim = 2, 2, 4 if slots.is_fused else 8
    assert slots.bytes_per_token == layers * 2 * heads * dim * 4
    assert slots.footprint == slots.bytes_per_token * 2 * 32
    slots.reserve(1, 80)
    assert slots.footprint == slots.bytes_per_token * 1 * 80
    slots.reserve(1, 4)
    assert slots.footprint == slots.bytes_per_token * 1 * 10
    assert_next(slots, model, [row])
    with pytest.raises(EngineError, match="at most 6 slots of 96 tokens"):
        slots.reserve(7, 4)


def test_size_of_a_token_is_known_before_the_first(model, slots):
    dim = 4 if slots.is_fused else 8
    assert slots.bytes_per_token == 2 * 2 * 2 * dim * 4
    assert slots.num_tokens_read == 0
    assert_next(slots, model, [[]])


@pytest.mark.parametrize(
    ("slots_", "rows", "wanted"),
    [
        ([], [], []),
        ([0, 1], [[1], [2]], [[0]]),
        ([0, 0], [[1], [2]], [[0], [0]]),
        ([0, 1], [[1], []], [[0], []]),
        ([0], [[1, 2]], [[2]]),
        ([0], [[1, 2]], [[-1]]),
        ([0], [[1, 2]], [[1, 0]]),
        ([0], [[1, 2]], [[1, 1]]),
    ],
)
def test_contradictory_reads_are_refused(slots, slots_, rows, wanted):
    with pytest.raises(EngineError, match="read: expected"):
        slots.read(slots_, rows, wanted)
    assert not slots.lengths.any()


def test_passes_bound_size_and_padding_and_lose_nothing():
    counts = np.random.default_rng(0).integers(1, 40, 50)
    ragged = Ragged.of(
        slots=range(50),
        starts=np.zeros(50, np.int64),
        token_ids=[np.arange(count) + 100 * row for row, count in enumerate(counts)],
        wanted=[[int(count) - 1] for count in counts],
    )
    parts = list(passes(ragged, max_cells=200, max_padding=30))
    for part, which in parts:
        cells = part.counts.max() * len(part.slots)
        assert cells <= 200
        assert cells - part.counts.sum() <= 30
        assert (
            part.token_ids[part.wanted].tolist() == ragged.token_ids[ragged.wanted][which].tolist()
        )
    tokens_read = np.sort(np.concatenate([part.token_ids for part, _ in parts]))
    assert tokens_read.tolist() == np.sort(ragged.token_ids).tolist()
    assert np.sort(np.concatenate([which for _, which in parts])).tolist() == list(range(50))


def test_storage_grows_one_tensor_at_a_time(monkeypatch):
    storage = SlotStorage(max_slots=100, max_tokens=1000)
    for _ in range(3):
        storage.add(heads=2, dim=2, dtype=torch.float32, device=torch.device("cpu"))
    storage.grow(3, 5)
    assert [tuple(tensor.shape) for tensor in storage.tensors] == [(16, 2, 128, 2)] * 3
    for index in range(3):
        storage.tensors[index][2, 1, 4] = 7.0
        halves = storage.halves(index, first_slot=2, num_slots=1, num_tokens=5)
        assert [half.sum() for half in halves] == [0, 14]
    del halves
    first = [tensor.data_ptr() for tensor in storage.tensors]
    storage.grow(16, 128)
    num_old = []
    resize = SlotStorage._resize

    def counted(self, index):
        assert not self._halves  # which would keep all old tensors
        num_old.append(len({tensor.data_ptr() for tensor in self.tensors} & set(first)))
        resize(self, index)

    monkeypatch.setattr(SlotStorage, "_resize", counted)
    storage.grow(17, 129)
    assert num_old == [3, 2, 1]
    assert [tuple(tensor.shape) for tensor in storage.tensors] == [(32, 2, 256, 2)] * 3
    for index in range(3):
        storage.tensors[index][2, 1, 3] = 1.0
        halves = storage.halves(index, first_slot=2, num_slots=1, num_tokens=5)
        assert [half.sum() for half in halves] == [0, 16]
    storage.grow(100, 700)
    assert tuple(storage.tensors[0].shape) == (100, 2, 700, 2)
    with pytest.raises(EngineError, match="at most 100 slots"):
        storage.grow(101, 1)


def test_cache_refuses_a_pass_without_a_span(model):
    from mentor_serve.engines.slots.kv_cache import SlotCache

    cache = SlotCache(SlotStorage(max_slots=1, max_tokens=8))
    assert isinstance(cache, Cache)
    with pytest.raises(RuntimeError, match="open span"):
        model(input_ids=torch.tensor([[1]]), past_key_values=cache, use_cache=True)
