"""Models made ready for training: adapters, half precision, checkpointed activations."""

import pytest
import torch
from learner_samples import VOCAB, parameter_change, random_groups, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mentor_serve.errors import ConfigError, WeightsError
from mentor_serve.learner import (
    LoraOptions,
    TorchBackend,
    TrainingOptions,
    UpdateConfig,
    build_batch,
)
from mentor_serve.learner.trainable import Trainable
from mentor_serve.weights import SnapshotLabel, write_snapshot

LORA = TrainingOptions(learning_rate=1e-2, lora=LoraOptions(rank=2, scale=4))


def batch_of(seed=0):
    groups = random_groups(tiny_model().eval(), seed=seed)
    return build_batch(groups, alpha=0.5, policy_version=0)


def built(options, model=None):
    backend = TorchBackend(options)
    backend.build(tiny_model() if model is None else model)
    return backend


def logits_of(model):
    ids = torch.arange(6)[None] % VOCAB
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_fresh_adapters_change_nothing():
    backend = built(LORA)
    torch.testing.assert_close(logits_of(backend.trainable.model), logits_of(tiny_model().eval()))
    for name, tensor in backend.full_state().items():
        assert torch.equal(tensor, tiny_model().state_dict()[name])


def test_only_adapters_are_trained_and_published_merged():
    backend = built(LORA)
    names = {
        name for name, item in backend.trainable.model.named_parameters() if item.requires_grad
    }
    assert names
    assert all("lora_" in name for name in names)
    backend.step(batch_of(), UpdateConfig())
    state = backend.full_state()
    plain = tiny_model()
    assert set(state) == set(plain.state_dict()) - {"lm_head.weight"}
    assert torch.equal(state["model.norm.weight"], plain.state_dict()["model.norm.weight"])
    plain.load_state_dict(state, strict=False)
    plain.tie_weights()
    torch.testing.assert_close(
        logits_of(plain.eval()), logits_of(backend.trainable.model), atol=1e-5, rtol=1e-5
    )
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(state[changed], tiny_model().state_dict()[changed])


def test_merged_adapters_are_a_plain_model_directory(tmp_path):
    backend = built(LORA)
    backend.step(batch_of(), UpdateConfig())
    label = SnapshotLabel(version=1, step=1, alpha=1.0, gamma=1.0, run_id="run")
    snapshot = write_snapshot(
        tmp_path, label=label, model=backend.model, state_dict=backend.full_state()
    )
    loaded = AutoModelForCausalLM.from_pretrained(snapshot.path)
    torch.testing.assert_close(
        logits_of(loaded.eval()), logits_of(backend.trainable.model), atol=1e-5, rtol=1e-5
    )


def test_adapters_resume_bit_for_bit(tmp_path):
    one = built(LORA)
    one.step(batch_of(0), UpdateConfig())
    one.save(tmp_path)
    other = built(LORA, tiny_model(seed=5))
    other.load(tmp_path)
    for backend in (one, other):
        backend.step(batch_of(1), UpdateConfig())
    for name, tensor in one.full_state().items():
        assert torch.equal(tensor, other.full_state()[name])


def test_adapters_start_afresh_on_loaded_weights():
    backend = built(LORA)
    backend.step(batch_of(), UpdateConfig())
    backend.load_weights(tiny_model(seed=3).state_dict())
    for name, tensor in backend.full_state().items():
        assert torch.equal(tensor, tiny_model(seed=3).state_dict()[name])


def test_modules_that_do_not_exist_are_named():
    options = TrainingOptions(lora=LoraOptions(target_modules=("no_such_layer",)))
    with pytest.raises(ConfigError, match="no_such_layer"):
        built(options)


def test_checkpointed_activations_give_the_same_gradient():
    plain, metrics = parameter_change(tiny_model().eval(), batch_of())
    trainable = Trainable(tiny_model(), TrainingOptions(gradient_checkpointing=True))
    assert trainable.model.is_gradient_checkpointing
    found, other = parameter_change(trainable.model, batch_of())
    assert other.loss == pytest.approx(metrics.loss, abs=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_activations_are_kept_once_a_layer_where_checkpointed():
    """Counts tensors saved for the backward pass, which is what checkpointing is for."""

    def saved(options):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        model = Trainable(tiny_model(num_hidden_layers=6), options).model
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            parameter_change(model, batch_of())
        return count

    assert saved(TrainingOptions(gradient_checkpointing=True)) < 0.5 * saved(TrainingOptions())


def test_dropout_is_gone_even_where_the_model_must_be_in_training_mode():
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    assert config.resid_pdrop > 0
    trainable = Trainable(model, TrainingOptions(gradient_checkpointing=True))
    assert trainable.model.training
    assert torch.equal(logits_of(trainable.model), logits_of(trainable.model))


def test_autocast_keeps_parameters_and_gradients_in_single_precision():
    backend = built(TrainingOptions(learning_rate=1e-2, autocast="bfloat16"))
    single = built(TrainingOptions(learning_rate=1e-2))
    metrics, exact = (item.step(batch_of(), UpdateConfig()) for item in (backend, single))
    assert {item.dtype for item in backend.trainable.model.parameters()} == {torch.float32}
    assert metrics.loss != exact.loss  # otherwise nothing ran in half precision
    # bfloat16 has 8 bits: log-probabilities of this model are off by about 0.01.
    assert metrics.loss == pytest.approx(exact.loss, abs=0.02)
    assert metrics.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)


def test_weights_of_another_model_are_refused_and_change_nothing():
    backend = built(TrainingOptions())
    before = backend.full_state()
    with pytest.raises(WeightsError, match="missing"):
        backend.load_weights({"model.norm.weight": torch.zeros(16)})
    other = tiny_model(hidden_size=32).state_dict()
    with pytest.raises(WeightsError, match="shape"):
        backend.load_weights(other)
    for name, tensor in backend.full_state().items():
        assert torch.equal(tensor, before[name])
