"""Loads a causal language model and its tokenizer from wherever the user keeps them.

A model is named by `embedded:policy` or `embedded:expert` (the bundled pair), a directory in
Hugging Face layout, a GGUF file or a directory that holds one, or a hub id. Everything that cannot
be used is a `ConfigError` that says what was expected and what to do. Code that ships with a model
(`trust_remote_code`) is never run, and a checkpoint that lacks weights is refused, because they
would be random.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from mentor_serve.errors import ConfigError
from mentor_serve.models.progress import no_progress_bar

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_PREFIX: Final = "embedded:"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_READ_ERRORS: Final = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    ImportError,
    struct.error,
)
"""What transformers raises about a damaged or foreign model."""
_PLAIN_TOKENIZER: Final = "TokenizersBackend"
"""Class of a tokenizer that is all in its tokenizer.json, as transformers 5 names it."""
_EXPECTED: Final = (
    "expected embedded:policy, embedded:expert, a model directory, a GGUF file or a hub id"
)


def resolve_model(name_or_path: str | Path) -> str | Path:
    """Return where a model lies: an existing directory or `.gguf` file, or the hub id unchanged.

    Raises:
        ConfigError: nothing at the path, a directory that holds no model, an unknown embedded name.
    """
    name = str(name_or_path)
    if name.startswith(EMBEDDED_PREFIX):
        return _embedded(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"model {name!r} is a file but not a .gguf; {_EXPECTED}")
        return path
    if isinstance(name_or_path, Path) or name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise ConfigError(f"model {name!r}: no such file or directory; {_EXPECTED}")
    return name


def load_model(
    name_or_path: str | Path, *, dtype: str = "float32", device: str = "cpu"
) -> PreTrainedModel:
    """Load a causal language model in eval mode, with torch's scaled-dot-product attention.

    Args:
        name_or_path: see `resolve_model`.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device, for instance `cpu` or `cuda:0`.

    Raises:
        ConfigError: the model cannot be found, read or put on the device, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    torch_dtype, torch_device = _torch_dtype(dtype), _torch_device(device)
    source, options = _source(name_or_path)
    if "gguf_file" in options:
        options["quantization_config"] = _gguf_config()
    with _Readable(name_or_path, "model"), no_progress_bar():
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch_dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model {str(name_or_path)!r} lacks {len(missing)} weights ({missing[0]}, ...), which "
            "would be random; expected a complete checkpoint of the architecture in config.json"
        )
    with _Readable(name_or_path, f"model on {device}"):
        model.to(torch_device)
    return cast("PreTrainedModel", model.eval())


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    That of the bundled pair, and of what is exported from it, loads without torch: the classes that
    find out what a model is import all of it, which takes seconds in every process.

    Raises:
        ConfigError: the model cannot be found, or has no usable tokenizer files.
    """
    source, options = _source(name_or_path)
    with _Readable(name_or_path, "tokenizer"):
        tokenizer = _tokenizer_class(source, options).from_pretrained(source, **options)
    if len(tokenizer) == 0:
        raise ConfigError(
            f"the tokenizer of {str(name_or_path)!r} is empty; "
            "expected tokenizer.json beside config.json"
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_config(name_or_path: str | Path) -> PretrainedConfig:
    """Load a model's configuration alone, for instance to check the vocabulary before the weights.

    Raises:
        ConfigError: the model cannot be found, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    source, options = _source(name_or_path)
    with _Readable(name_or_path, "config"):
        config = AutoConfig.from_pretrained(source, **options)
    return cast("PretrainedConfig", config)


def load_logits_width(name_or_path: str | Path) -> int:
    """Read how wide a model's logits are: `vocab_size`, which padding may make larger than its
    tokenizer. Of a Llama in a directory it takes no torch.

    Raises:
        ConfigError: the model cannot be found, or its configuration cannot be read.
    """
    source, options = _source(name_or_path)
    with _Readable(name_or_path, "config"):
        width = _llama_config(source, options).get("vocab_size")
    if width is None:
        # Models with a vision tower keep the language model's numbers one level down.
        width = load_config(name_or_path).get_text_config().vocab_size
    return int(width)


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[int, ...]:
    """Return every token id that ends a response, ascending; empty if the model names none.

    The union of what the generation config, the model config and the tokenizer name, because chat
    models often list the end of a turn in one of them alone.
    """
    named = [model.config, getattr(model, "generation_config", None), tokenizer]
    found: set[int] = set()
    for owner in named:
        ids = getattr(owner, "eos_token_id", None)
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return tuple(sorted(found))


def _embedded(name: str) -> Path:
    from mentor_serve.models.reference import reference_path

    match name.removeprefix(EMBEDDED_PREFIX):
        case "policy" | "expert" as model:
            return _directory(reference_path(model))
        case _:
            raise ConfigError(f"model {name!r}: expected embedded:policy or embedded:expert")


def _directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return gguf_files[0]
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files)
        raise ConfigError(f"model directory {path} holds several GGUF files ({names}): name one")
    what = "does not exist" if not path.is_dir() else "holds neither config.json nor a .gguf file"
    raise ConfigError(
        f"model directory {path} {what}; expected what save_pretrained writes "
        "(config.json, model.safetensors, tokenizer.json)"
    )


def _source(name_or_path: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the first argument of `from_pretrained` and the options that go with it."""
    resolved = resolve_model(name_or_path)
    if isinstance(resolved, str):
        return resolved, {}
    if resolved.suffix == ".gguf" and resolved.is_file():
        return str(resolved.parent), {"gguf_file": resolved.name}
    return str(resolved), {"local_files_only": True}


def _llama_config(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Llama in a directory, else nothing."""
    if "local_files_only" not in options:
        return {}
    config = _read_object(Path(source) / "config.json")
    return config if config.get("model_type") == "llama" else {}


def _read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where the JSON is something else."""
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _tokenizer_class(source: str, options: dict[str, Any]) -> Any:
    if _has_plain_tokenizer(source, options):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _has_plain_tokenizer(source: str, options: dict[str, Any]) -> bool:
    """Whether `AutoTokenizer` would come to the class that tokenizer_config.json names.

    For a Llama it does; of some other models it knows that the file names the wrong one.
    """
    file = Path(source) / "tokenizer_config.json"
    if not _llama_config(source, options) or not file.is_file():
        return False
    config = _read_object(file)
    return config.get("tokenizer_class") == _PLAIN_TOKENIZER and "auto_map" not in config


def _gguf_config() -> Any:
    from transformers import GgufConfig

    return GgufConfig(dequantize=True)


def _torch_dtype(dtype: str) -> torch.dtype:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(known)}")
    return known[dtype]


def _torch_device(device: str) -> torch.device:
    import torch

    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: expected cpu, cuda or cuda:<index>") from error
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise ConfigError(f"device {device!r}: this machine offers {count} CUDA devices")
    return found


class _Readable:
    """Turns what transformers raises about a model into a `ConfigError`, and nothing else."""

    def __init__(self, name_or_path: str | Path, part: str) -> None:
        self._name = str(name_or_path)
        self._part = part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        from safetensors import SafetensorError

        if not isinstance(error, (*_READ_ERRORS, SafetensorError)):
            return
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"cannot load the {self._part} of {self._name!r}: {first_line} ({_EXPECTED}; "
            "a hub id needs access to the hub or a filled cache, a GGUF file the extra "
            "`pip install mentor-serve[gguf]`)"
        ) from error
