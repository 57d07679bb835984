# SPDX-License-Identifier: Apache-2.0
"""What a perfect choice gains, and several comparisons on one page."""

import json
import re

import numpy as np
import pytest

from tests.unit.curves import BUDGET, HIGH, LOW, REGIME, curve_of, seeds_of, write_comparison
from verl_gradalign.experiments import overview
from verl_gradalign.experiments.learning_curves import by_method, gain
from verl_gradalign.experiments.overview import (
    areas_table,
    ends_table,
    read_comparison,
    regimes_table,
    tokens_table,
    write_overview,
)
from verl_gradalign.experiments.tuned_report import gain_remark


@pytest.mark.parametrize(
    ("accuracy", "says"),
    [
        ([0.3, 0.6, 0.9], r"takes 1\.0 times the tokens .*\*\*with less than 1\.5"),
        ([0.3, 1.8, 0.9], r"takes 5\.0 times"),
    ],
)
def test_what_a_perfect_choice_gains_is_said_and_whether_that_is_too_little(accuracy, says):
    methods = by_method([curve_of("random", 1, [0.3, 0.6, 0.9]), curve_of("oracle", 1, accuracy)])
    (remark,) = gain_remark(methods, 0.8, BUDGET)
    assert re.search(says, remark)


def test_a_gain_on_what_is_never_reached_is_a_bound_and_an_oracle_that_fails_gains_nothing():
    low, high = by_method(seeds_of("random", LOW))["random"], by_method(seeds_of("oracle", HIGH))["oracle"]
    # 5,000 tokens are all; the high ones reach 0.6 half way.
    assert gain(high, low, 0.6, BUDGET) == (pytest.approx(2.0), True)
    assert np.isnan(gain(low, high, 0.6, BUDGET)[0]) and np.isnan(gain(high, low, 0.2, BUDGET)[0])
    remarks = gain_remark({"random": low, "oracle": high}, 0.6, BUDGET)
    assert remarks == ["To get there random takes more than 2.0 times the tokens of a perfect choice (oracle)."]
    assert "it never reaches" in gain_remark({"random": high, "oracle": low}, 0.6, BUDGET)[0]
    assert gain_remark({"random": low}, 0.6, BUDGET) == [] == gain_remark({}, float("nan"), BUDGET)


@pytest.fixture
def folder(tmp_path):
    """A comparison that is done, with a learning rate tried on another seed."""
    write_comparison(tmp_path / REGIME)
    return tmp_path / REGIME


def test_the_tables_are_of_fresh_seeds_and_pair_them(folder):
    read = read_comparison(folder)
    assert {method: sorted(of_seed) for method, of_seed in read.methods.items()} == {
        "random": [1, 2, 3],
        "oracle": [1, 2, 3],
        "forecast": [2, 3],
    }
    assert regimes_table([read]).splitlines()[-1] == f"| {REGIME} | 30.0 | 42.0 | 92.0 | 60.0 | > 2.0 |"
    assert ends_table([read]).splitlines()[2:] == [
        "| `random` | 42.0 |",
        "| `oracle` | 92.0 |",
        "| `forecast` | 72.5 |",
    ]
    oracle, forecast = areas_table([read]).splitlines()[3:]
    assert oracle == "| `oracle` | **+27.5 ± 0.0** |" and forecast == "| `forecast` | **+17.5 ± 0.0** |"
    # Of 5,000 tokens: the forecast's seeds 2 and 3 get to 0.6 after 72 and 71%.
    assert tokens_table([read]).splitlines()[2:] == [
        "| `random` | 1 |",
        "| `oracle` | < 0.50 |",
        "| `forecast` | < 0.73 |",
    ]


def test_one_page_holds_several_regimes(folder, tmp_path, monkeypatch):
    write_overview([folder, folder], tmp_path / "out")
    page = (tmp_path / "out" / "overview.md").read_text()
    assert page.count(f"| method | {REGIME} | {REGIME} |") == 3 and page.count("| `oracle` |") == 3
    assert (tmp_path / "out" / "overview.png").read_bytes()[:4] == b"\x89PNG"
    figures = []
    monkeypatch.setattr(overview.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    overview.draw([read_comparison(folder)] * 2, tmp_path / "figure.png")
    shown = [panel for panel in figures[0].axes if panel.get_visible()]
    # Thin lines for eight runs of three methods, their means, and the accuracy to reach.
    assert [panel.get_title() for panel in shown] == [REGIME] * 2 and [len(panel.lines) for panel in shown] == [12, 12]


@pytest.mark.parametrize(("settings", "says"), [(None, "no comparison.json"), ({"regime": REGIME}, "has no budget")])
def test_a_folder_that_is_of_no_tuned_comparison_is_refused(tmp_path, settings, says):
    (tmp_path / "curves.csv").touch()
    if settings:
        (tmp_path / "comparison.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{says}.*Remedy: name folders of `compare --tune`"):
        read_comparison(tmp_path)


def test_a_comparison_of_an_earlier_version_or_without_an_oracle_is_refused_with_the_remedy(folder):
    table = (folder / "curves.csv").read_text()
    (folder / "curves.csv").write_text("".join(line for line in table.splitlines(True) if ",oracle," not in line))
    with pytest.raises(ValueError, match="oracle was not run. Remedy: run it with the same command"):
        read_comparison(folder)
    (folder / "curves.csv").write_text("".join(line.partition(",")[2] for line in table.splitlines(True)))
    with pytest.raises(ValueError, match="of an earlier version. Remedy: give the comparison's command again"):
        read_comparison(folder)
