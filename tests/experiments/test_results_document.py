"""docs/results.md shows the numbers that lie beside it, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mentor_serve.experiments.tables import all_tables

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = json.loads((DOCS / "results" / "laptop.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", list(all_tables(RESULTS)))
def test_every_table_is_in_the_document(name: str):
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    assert all_tables(RESULTS)[name] in text


def test_every_figure_is_shown_and_has_its_data_beside_it():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    pictures = sorted((DOCS / "results").glob("*.svg"))
    assert len(pictures) == 4
    for picture in pictures:
        assert f"(results/{picture.name})" in text
        assert json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
