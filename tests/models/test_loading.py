import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mentor_serve.errors import ConfigError
from mentor_serve.models import (
    end_token_ids,
    load_config,
    load_logits_width,
    load_model,
    load_tokenizer,
    resolve_model,
)
from mentor_serve.models.reference.tokenizer import build_tokenizer
from tests.imports import loaded_by


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def copy_of(model_dir: Path, target: Path) -> Path:
    target.mkdir()
    for file in model_dir.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_directory_loads_in_eval_mode_with_the_asked_dtype_and_sdpa(model_dir: Path) -> None:
    model = load_model(str(model_dir), dtype="bfloat16")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    assert load_model(model_dir).dtype == torch.float32


def test_the_tokenizer_and_config_of_a_directory_load(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.decode(tokenizer("1 + 2")["input_ids"]) == "1 + 2"
    assert load_config(model_dir).vocab_size == len(tokenizer)


@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "LlamaTokenizer"])
def test_a_tokenizer_is_the_one_that_transformers_would_choose(
    model_dir: Path, tmp_path: Path, tokenizer_class: str
) -> None:
    directory = copy_of(model_dir, tmp_path / "copy")
    file = directory / "tokenizer_config.json"
    named = json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}
    file.write_text(json.dumps(named))
    found, expected = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert type(found) is type(expected)
    assert found.get_vocab() == expected.get_vocab()
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template
    assert (found.padding_side, found.model_max_length) == (
        expected.padding_side,
        expected.model_max_length,
    )
    text = "<|user|>1 + 2 = okay, wait<|end|>"
    assert found(text)["input_ids"] == expected(text)["input_ids"]


def test_tokenizer_and_width_of_the_bundled_pair_take_no_torch() -> None:
    """Gateway, collectors and the command line need no more; importing torch takes seconds."""
    code = (
        "from mentor_serve.models import load_logits_width, load_tokenizer\n"
        "assert len(load_tokenizer('embedded:policy')) == load_logits_width('embedded:expert')"
    )
    assert "torch" not in loaded_by(code)


def test_the_width_is_that_of_the_language_model(model_dir: Path, tmp_path: Path) -> None:
    assert load_logits_width(model_dir) == load_config(model_dir).vocab_size
    text = {"model_type": "qwen2", "vocab_size": 8, "hidden_size": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_vl", "vocab_size": 9, "text_config": text})
    )
    assert load_logits_width(tmp_path) == 8


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot load the config"):
        load_logits_width(tmp_path)


def test_hub_ids_stay_as_they_are() -> None:
    assert resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert resolve_model("gpt2") == "gpt2"


def test_a_directory_with_one_gguf_file_resolves_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve_model(tmp_path) == tmp_path / "a.gguf"
    assert resolve_model(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


def two_ggufs(path: Path) -> str:
    (path / "a.gguf").write_bytes(b"GGUF")
    (path / "b.gguf").write_bytes(b"GGUF")
    return str(path)


def text_file(path: Path) -> str:
    (path / "notes.txt").write_text("no model")
    return str(path / "notes.txt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "missing"), "no such file or directory"),
        (lambda path: path / "missing", "no such file or directory"),
        (lambda path: "./missing.gguf", "no such file or directory"),
        (str, "neither config.json nor a .gguf"),
        (two_ggufs, "several GGUF files"),
        (text_file, "not a .gguf"),
        (lambda path: "embedded:teacher", "embedded:policy or embedded:expert"),
    ],
)
def test_what_is_no_model_is_a_config_error(
    tmp_path: Path, make: Callable[[Path], str | Path], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(make(tmp_path))


def test_a_broken_config_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    for load in (load_model, load_tokenizer, load_config):
        with pytest.raises(ConfigError, match="cannot load the"):
            load(tmp_path)


def test_a_truncated_weight_file_is_a_config_error(model_dir: Path, tmp_path: Path) -> None:
    broken = copy_of(model_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_model(broken)


def test_a_checkpoint_that_lacks_weights_is_refused(model_dir: Path, tmp_path: Path) -> None:
    partial = copy_of(model_dir, tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights \(model\.norm\.weight"):
        load_model(partial)


def test_a_directory_without_tokenizer_files_is_a_config_error(
    model_dir: Path, tmp_path: Path
) -> None:
    bare = copy_of(model_dir, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(bare)


def test_an_unreadable_gguf_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="gguf"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "expected one of float32"),
        ({"device": "gpu"}, "expected cpu, cuda"),
        ({"device": "cuda:99"}, "offers"),
    ],
)
def test_a_wrong_dtype_or_device_is_a_config_error(
    model_dir: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(model_dir, **options)


def test_end_tokens_are_the_union_of_what_model_and_tokenizer_name(model_dir: Path) -> None:
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    assert end_token_ids(model, tokenizer) == (tokenizer.eos_token_id,)
    model.generation_config.eos_token_id = [7, 5]
    assert end_token_ids(model, tokenizer) == tuple(sorted({5, 7, tokenizer.eos_token_id}))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert end_token_ids(model) == ()
