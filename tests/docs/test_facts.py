# SPDX-License-Identifier: Apache-2.0
"""What the pages say by name exists: configuration keys, metrics, reasons, messages."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict

import pytest

from tests.docs.documents import ROOT, documentation
from tests.docs.running import OVERRIDES, validate
from verl_gradalign.config import GradAlignConfig
from verl_gradalign.config_fields import decisive
from verl_gradalign.integration import run_identity as integration_checkpoint
from verl_gradalign.integration.run_identity import DECISIVE_OF_VERL
from verl_gradalign.metrics import CATALOGUE, metric_of
from verl_gradalign.reference import blocks_of
from verl_gradalign.selection import state_file as selection_checkpoint
from verl_gradalign.selection.select import REASONS

HOW_TO = ROOT / "recipes" / "how_to"
MAX_LINES, MAX_WORDS = 220, 2000
COSINE = "+gradalign=cosine"
TRUSTED = "gradalign.validation.files=trusted.parquet"


def name_of(page):
    return str(page.relative_to(ROOT))


def page(name):
    return (HOW_TO / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", documentation(), ids=name_of)
def test_every_key_that_a_page_names_is_one(path):
    names = {key.name.replace("[]", "") for block in blocks_of() for key in block.keys}
    names |= {block.name.replace("[]", "") for block in blocks_of()}
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r"(?<![\w.\[])gradalign(?:\.[a-z_]+)+(?!\w|\()", text)) - {"gradalign.npz"}
    unknown = {name for name in found if name not in names}
    assert not unknown, f"{name_of(path)}: {unknown}"


@pytest.mark.parametrize("path", documentation(), ids=name_of)
def test_every_metric_that_a_page_names_is_in_the_catalogue(path):
    spans = re.findall(r"`gradalign/([^`\s]+)`", path.read_text(encoding="utf-8"))
    for name in [span for span in spans if not span.startswith(("earlier-", "*"))]:
        if name.endswith("/*"):
            assert any(metric.name.startswith(name[:-1]) for metric in CATALOGUE), f"{name_of(path)}: {name}"
        else:
            assert metric_of(name) is not None, f"{name_of(path)}: {name}"


def test_what_a_resumed_run_is_compared_by_is_listed_whole():
    text = page("resume.md")
    assert all(f"`{key}`" in text for key in DECISIVE_OF_VERL)
    every, values = asdict(GradAlignConfig()), decisive(GradAlignConfig())
    assert set(every) - set(values) == {"poll_interval_s", "log"}
    assert all(f"`{key}`" in text for key in ("poll_interval_s", "log.*"))
    neutral = set(every["probe"]) - set(values["probe"])
    canary = {key for key in neutral if key.startswith("canary_")}
    assert canary and all(f"`probe.{key}`" in text for key in neutral - canary)


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES and len(text.split()) <= MAX_WORDS


def test_every_reason_is_explained():
    assert all(re.search(rf"\b{reason}\b", page("read_report.md")) for reason in REASONS)


@pytest.mark.parametrize(
    ("message", "overrides"),
    [
        ("score cosine needs a trusted set", [COSINE]),
        ("problems also stand in data.train_files", [COSINE, "gradalign.validation.files=train.parquet"]),
        (
            "schedule step draws 512 candidates at a time",
            [COSINE, TRUSTED, "data.train_batch_size=128", "data.train_max_samples=500"],
        ),
        ("its gradalign keys were overwritten", ["+regime=imbalance", COSINE]),
    ],
)
def test_a_message_that_the_page_quotes_is_the_one_that_is_raised(message, overrides, place):
    assert message in page("launch_script.md")
    with pytest.raises(ValueError, match=f"{message}.*Remedy"):
        validate([*OVERRIDES.split(), *overrides])


def test_messages_about_resuming_are_those_of_the_code():
    source = inspect.getsource(selection_checkpoint) + inspect.getsource(integration_checkpoint)
    for words in ("holds the selection of another run", "has no selection state"):
        assert words in source and words in page("resume.md")
