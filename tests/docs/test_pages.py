# SPDX-License-Identifier: Apache-2.0
"""The pages' Python blocks run as they stand, their links lead somewhere, and tables of fields are complete."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from tests.docs.documents import ROOT, documentation, links_of, python_blocks, sections_of
from verl_gradalign import Measurements, Score
from verl_gradalign.probe import layer_rules
from verl_gradalign.probe.layer_rules import LayerCall

HOW_TO = ROOT / "recipes" / "how_to"
WITH_PYTHON = [page for page in documentation() if python_blocks(page)]
# Needs samples and a model, which tests/numerics/test_without_verl.py gives it.
ELSEWHERE = "trusted_samples"


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def registry():
    """Forgets the rules that a page registers."""
    before = dict(layer_rules.LAYER_RULES)
    yield
    layer_rules.LAYER_RULES.clear()
    layer_rules.LAYER_RULES.update(before)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs_in_order(page, place, registry):
    namespace: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in python_blocks(page):
            if ELSEWHERE in block and page == HOW_TO / "without_verl.md":
                continue
            exec(compile(block, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", documentation(), ids=name_of)
def test_every_link_leads_to_a_file_or_a_section(page):
    for target in links_of(page):
        path, _, section = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{name_of(page)}: {target} does not exist"
        if section and place.suffix == ".md":
            assert section in sections_of(place), (
                f"{name_of(page)}: {target} is no section; there are {sections_of(place)}"
            )


def test_every_how_to_is_in_the_index():
    assert {page.name for page in HOW_TO.glob("*.md")} - {"README.md"} <= set(links_of(HOW_TO / "README.md"))


@pytest.mark.parametrize(
    ("page", "cls"), [("own_score.md", Measurements), ("own_score.md", Score), ("layer_rule.md", LayerCall)]
)
def test_every_field_that_a_function_gets_is_explained(page, cls):
    text = (HOW_TO / page).read_text(encoding="utf-8")
    names = [field.name for field in fields(cls)]
    if cls is Measurements:
        names += [name for name, value in vars(cls).items() if isinstance(value, property)]
    for name in names:
        assert f"| `{name}` |" in text, name


def test_pages_are_ascii():
    for page in HOW_TO.glob("*.md"):
        assert page.read_text(encoding="utf-8").isascii(), page.name
