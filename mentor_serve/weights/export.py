"""A kept version as a plain Hugging Face directory, for anything that loads models.

`DIR/` holds weights (in shards where they are large), `config.json`, `generation_config.json`, the
tokenizer's files, `README.md` (the model card), and `SHA256SUMS`, which `sha256sum -c` reads. It
appears whole or not at all. Nothing of this project is needed to load it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mentor_serve.errors import ConfigError
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.models.progress import no_progress_bar
from mentor_serve.weights.directories import atomic_directory, file_sha256

CHECKSUMS = "SHA256SUMS"
CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedModel:
    """What was written."""

    path: Path
    files: dict[str, str]
    """Name to SHA-256 of its bytes, `SHA256SUMS` itself left out."""
    num_bytes: int
    """Of these files together."""


def check_target(target: Path) -> None:
    """Return if an export may be written to `target`.

    Raises:
        ConfigError: there is something already, or it cannot be made.
    """
    if target.exists():
        raise ConfigError(
            f"--to {target}: expected a directory that does not exist yet; remove it or choose "
            "another name"
        )
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to {target}: {parent} cannot be made: {error.strerror}") from error


def export_model(source: Path, target: Path, *, dtype: str, card: str) -> ExportedModel:
    """Write the model directory `source` to `target`, its weights as `dtype`.

    Args:
        source: a snapshot whose weights were verified.
        target: must not exist yet.
        dtype: `float32`, `bfloat16` or `float16`.
        card: text of the model card.

    Raises:
        ConfigError: see `check_target`; or `source` cannot be loaded.
    """
    check_target(target)
    model, tokenizer = load_model(source, dtype=dtype), load_tokenizer(source)
    with atomic_directory(target.absolute()) as staging:
        with no_progress_bar():
            model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / CARD).write_text(card, encoding="utf-8")
        paths = sorted(path for path in staging.rglob("*") if path.is_file())
        files = {path.relative_to(staging).as_posix(): file_sha256(path) for path in paths}
        num_bytes = sum(path.stat().st_size for path in paths)
        lines = "".join(f"{sha256}  {name}\n" for name, sha256 in files.items())
        (staging / CHECKSUMS).write_text(lines, encoding="utf-8")
    return ExportedModel(path=target.absolute(), files=files, num_bytes=num_bytes)
