# SPDX-License-Identifier: Apache-2.0
"""The reference pages say what the code goes by: made anew they are what stands in the checkout, and nothing is left
out."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from verl_gradalign import reference
from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.checks import check_score
from verl_gradalign.metrics import CATALOGUE, PREFIX

ROOT = Path(__file__).parents[2]
PAGES = ("configs/gradalign/README.md", "recipes/how_to/metrics.md")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_up_to_date(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text == reference.pages()[path], f"{path} is out of date. Remedy: run `make docs` and commit what it wrote."


def test_the_command_writes_both_pages_below_the_folder_it_is_given(tmp_path):
    command = [sys.executable, "-m", "verl_gradalign.reference", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == set(PAGES)


def test_importing_the_generator_does_not_import_torch():
    code = "import sys, verl_gradalign.reference; sys.exit('torch' in sys.modules or 'verl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_key_of_the_yaml_is_on_the_page_with_its_default_and_a_text():
    from omegaconf import OmegaConf

    def flat(block, prefix):
        for key, value in block.items():
            yield from flat(value, f"{prefix}.{key}") if isinstance(value, dict) else [(f"{prefix}.{key}", value)]

    keys = {key.name: key for block in reference.blocks_of() for key in block.keys}
    yaml = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/gradalign/base.yaml"))["gradalign"]
    in_yaml = dict(flat(yaml, "gradalign"))
    assert set(in_yaml) == {name for name in keys if "[]" not in name}
    for name, value in in_yaml.items():
        assert OmegaConf.to_container(OmegaConf.create(f"value: {keys[name].default}"))["value"] == value, name
    assert all(len(key.text) > 10 and key.text.isascii() for key in keys.values())


def test_every_key_with_a_fixed_choice_of_names_shows_them_all():
    """Another name is refused, with the same list."""
    page = reference.configuration_page()
    choices = reference.choices_of_keys()
    assert {"score", "schedule", "probe.oversized", "reliability.of"} <= set(choices) and len(choices) == 16
    for key, names in choices.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `gradalign.{key}` |")]
        assert all(f"`{name}`" in row for name in names)
        block, dot, field = key.rpartition(".")
        values = {block: {field: "nonsense"}} if dot else {field: "nonsense"}
        with pytest.raises(ValueError, match=f"gradalign.{key}='nonsense': unknown; known are {', '.join(names)}"):
            check_score(GradAlignConfig.from_mapping(values))


def test_every_metric_is_on_its_page_with_unit_and_formula():
    rows = reference.metrics_page().splitlines()
    for metric in CATALOGUE:
        (row,) = [line for line in rows if line.startswith(f"| `{PREFIX}{metric.name}` |")]
        assert f"| {reference.cell(metric.unit)} | {reference.cell(metric.formula)} |" in row


@pytest.mark.parametrize("path", PAGES)
def test_every_row_of_a_table_has_the_cells_of_its_header(path):
    width = 0
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        num_cells = line.replace(r"\|", "").count("|") - 1
        width = width or num_cells
        assert num_cells == width, line


def test_outside_of_code_nothing_in_a_cell_is_taken_for_markup():
    assert reference.cell("|v| of <name> a * b * c, `<set> a*b`") == r"\|v\| of &lt;name> a \* b \* c, `<set> a*b`"


def test_a_field_without_a_text_is_refused_by_name():
    @dataclass(frozen=True)
    class Bare:
        size: int = 1

    with pytest.raises(ValueError, match="gradalign.bare.size: nothing stands below Bare.size. Remedy"):
        reference.blocks_of(Bare, "gradalign.bare")
