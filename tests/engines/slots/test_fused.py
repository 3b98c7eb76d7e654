"""The fused forward gives what the Hugging Face forward gives, from the same parameters."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from mentor_serve.engines.slots.fused import FusedForward
from mentor_serve.engines.slots.fused_weights import fuse
from mentor_serve.engines.slots.probe import fused_deviation
from mentor_serve.engines.slots.slot_model import SlotModel
from mentor_serve.engines.weight_swap import copy_weights
from mentor_serve.errors import EngineError

VOCAB = 37
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama-one-key-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-all-key-heads": ("Llama", {"num_key_value_heads": 6}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 10}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
}


def build(family: str, dtype=torch.float32, seed=0, **changes):
    config = getattr(transformers, f"{family}Config")(**(SMALL | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            # Biases begin at zero and norms at one, where a mistake about them would not show.
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.to(dtype).eval()


@pytest.fixture(params=MODELS)
def model(request):
    family, changes = MODELS[request.param]
    return build(family, **changes)


def tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


@torch.inference_mode()
def own_logits(model, row):
    return model(input_ids=torch.tensor(np.array(row))[None], use_cache=False).logits[0].float()


@torch.inference_mode()
def fused_logits(slots, row):
    slots.truncate(0, 0)
    return slots.read([0], [row], [range(len(row))])


@torch.inference_mode()
def test_logits_equal_those_of_hugging_face(model):
    rows = [tokens(length, seed=length) for length in (9, 1, 40, 17)]
    expected = torch.cat([own_logits(model, row) for row in rows])
    slots = SlotModel(model, max_slots=6, max_tokens=64)
    assert slots.is_fused
    got = slots.read([4, 0, 5, 2], rows, [range(len(row)) for row in rows])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_decoding_equals_hugging_face(model):
    rows = tokens(3, 12)
    expected = torch.stack([own_logits(model, row) for row in rows])
    slots = SlotModel(model, max_slots=3, max_tokens=64)
    for place in range(rows.shape[1]):
        got = slots.decode(torch.from_numpy(rows[:, place]))
        torch.testing.assert_close(got, expected[:, place], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 12])
@torch.inference_mode()
def test_bfloat16_stays_close_to_float32(num_rows):
    """Within 5% of the largest logit: bfloat16 keeps 8 bits, so one rounding is 0.4%."""
    exact = build("Llama", seed=3)
    rows = tokens(num_rows, 12)
    expected = torch.stack([own_logits(exact, row) for row in rows])
    slots = SlotModel(copy.deepcopy(exact).to(torch.bfloat16), max_slots=16, max_tokens=64)
    assert slots.is_fused
    got = [slots.decode(torch.from_numpy(rows[:, place])) for place in range(rows.shape[1])]
    assert got[0].dtype == torch.float32
    difference = (torch.stack(got, 1) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.05


def test_fusing_keeps_the_parameters_and_their_values(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = dict(model.named_parameters())
    SlotModel(model, max_slots=2, max_tokens=64)
    after = dict(model.named_parameters())
    assert all(after[name] is objects[name] for name in objects)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    attention = model.model.layers[0].self_attn
    memory = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.v_proj)}
    assert len(memory) == 1


def test_fusing_adds_no_memory_and_a_second_model_shares_it():
    model = build("Llama")
    SlotModel(model, max_slots=2, max_tokens=64)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    total = sum(
        size
        for size in {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
        }.values()
    )
    assert total == sum(parameter.nbytes for parameter in model.parameters())
    second = SlotModel(model, max_slots=3, max_tokens=64)
    assert second.is_fused
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    row = tokens(8)
    torch.testing.assert_close(
        fused_logits(second, row), own_logits(model, row), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3"])
def test_weights_written_in_place_are_seen(name):
    family, changes = MODELS[name]
    model, other = build(family, seed=1, **changes), build(family, seed=2, **changes)
    slots, row = SlotModel(model, max_slots=1, max_tokens=64), tokens(8)
    old, new = own_logits(model, row), own_logits(other, row)
    torch.testing.assert_close(fused_logits(slots, row), old, atol=1e-4, rtol=1e-4)
    copy_weights(model, other.state_dict())
    torch.testing.assert_close(fused_logits(slots, row), new, atol=1e-4, rtol=1e-4)
    model.load_state_dict(build(family, seed=1, **changes).state_dict())
    torch.testing.assert_close(fused_logits(slots, row), old, atol=1e-4, rtol=1e-4)


def test_a_fused_model_trains_and_the_fused_forward_follows():
    model = build("Qwen2")
    with torch.inference_mode():
        slots = SlotModel(model, max_slots=1, max_tokens=64)
    row = tokens(8)
    before = fused_logits(slots, row)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=torch.from_numpy(row)[None]).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    after = fused_logits(slots, row)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, own_logits(model, row), atol=1e-4, rtol=1e-4)


def test_a_fused_model_is_saved_and_copied_like_any_other(model, tmp_path):
    SlotModel(model, max_slots=1, max_tokens=64)
    row = tokens(8)
    expected = own_logits(model, row)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(own_logits(reloaded, row), expected, atol=1e-6, rtol=1e-6)
    weights = dict(model.named_parameters())
    save_file(weights, tmp_path / "plain.safetensors")
    loaded = load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(
        fused_logits(SlotModel(twin, max_slots=1, max_tokens=64), row),
        expected,
        atol=1e-4,
        rtol=1e-4,
    )


def test_replaced_parameters_are_refused():
    model = build("Llama")
    slots, row = SlotModel(model, max_slots=1, max_tokens=64), tokens(8)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(EngineError, match="moved or replaced"):
        fused_logits(slots, row)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "not silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "sequence length",
        ),
    ],
)
def test_unusual_llamas_run_on_their_own_forward(change, reason):
    model = build("Llama", **change)
    assert reason in FusedForward.supports(model)
    with capture_logs() as logs:
        slots = SlotModel(model, max_slots=1, max_tokens=64)
    assert not slots.is_fused
    assert not logs
    row = tokens(8)
    torch.testing.assert_close(
        fused_logits(slots, row), own_logits(model, row), atol=1e-4, rtol=1e-4
    )


def test_changed_modules_and_hooks_are_not_fused():
    class Adapted(torch.nn.Linear):
        pass

    model = build("Llama")
    assert FusedForward.supports(model) is None
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert "hook" in FusedForward.supports(model)
    hook.remove()
    shared = model.model.layers[0].mlp.up_proj.weight
    own = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = shared
    assert "share" in FusedForward.supports(model)
    model.model.layers[1].mlp.up_proj.weight = own
    model.model.layers[0].mlp.up_proj = Adapted(24, 40, bias=False)
    assert "Adapted" in FusedForward.supports(model)
    with pytest.raises(EngineError, match="Adapted"):
        FusedForward(model, None, max_slots=1, max_tokens=1)


def test_a_wrong_fused_forward_is_noticed_and_not_used(monkeypatch):
    model, row = build("Llama"), tokens(8)
    finish = FusedForward._finish

    def slightly_off(self, layer, hidden, attended):
        return finish(self, layer, hidden, attended * 1.01)

    assert fused_deviation(model) < 1e-5
    monkeypatch.setattr(FusedForward, "_finish", slightly_off)
    with capture_logs() as logs:
        slots = SlotModel(model, max_slots=1, max_tokens=64)
    assert not slots.is_fused
    (event,) = logs
    assert event["log_level"] == "warning"
    assert event["deviation"] > event["tolerance"]
    torch.testing.assert_close(
        fused_logits(slots, row), own_logits(model, row), atol=1e-4, rtol=1e-4
    )


def test_fuse_stacks_only_what_lies_apart():
    first, second = (torch.nn.Parameter(torch.randn(rows, 3)) for rows in (2, 4))
    expected = torch.cat([first, second])
    joint = fuse([first, second])
    assert torch.equal(joint, expected)
    assert fuse([first, second]).data_ptr() == joint.data_ptr() == first.data_ptr()
    swapped = fuse([second, first])
    assert torch.equal(swapped, torch.cat([second, first]))
    assert swapped.data_ptr() == second.data_ptr() != joint.data_ptr()
