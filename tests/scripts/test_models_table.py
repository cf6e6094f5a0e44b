"""The table of docs/models.md is what its script prints."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
script: Any = importlib.import_module("models_table")


def test_page_has_the_table_that_its_script_prints() -> None:
    page = script.PAGE.read_text("utf-8")
    before, after = script.page_around(page)
    assert page == before + script.table() + after, "run scripts/models_table.py --write"


def test_every_variant_has_a_parity_figure_below_the_tests_bound() -> None:
    figures = json.loads(script.FIGURES.read_text("utf-8"))
    assert figures.keys() == script.ALL.keys(), "run scripts/models_table.py --measure --write"
    assert max(figures.values()) < 1e-4
