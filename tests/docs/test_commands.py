# SPDX-License-Identifier: Apache-2.0
"""Every command of the documentation is handled by exactly one entry of ENTRIES, which runs it, or as much of it as
takes seconds. Nothing is trained here: where that is left out, the entry names the tests that do it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from tests.docs.documents import ROOT, Command, commands_of, documentation
from tests.docs.running import (
    ENTRY_POINT,
    OVERRIDES,
    accepted,
    compose_launch,
    compose_script,
    examine,
    help_of_script,
    hold_out_of_a_copy,
    installable,
    make_targets,
    module_exists,
    overview_of_little,
    paths_exist,
    prepare_little,
    run_as_written,
    validate,
    words_of,
    write_reference,
)
from verl_gradalign.cli import app

DEMO = ("tests/e2e/test_demo.py::test_the_demonstration_makes_its_table_from_an_empty_folder",)
LAUNCHES = ("tests/e2e/test_step.py::test_kept_groups_are_the_top_scored_ones",)


@dataclass(frozen=True)
class Entry:
    """What is done with the commands that a pattern matches."""

    pattern: str
    handle: Callable[[Command, Path, pytest.MonkeyPatch], None]
    covered_by: tuple[str, ...] = ()
    """Tests that do what the handler leaves out."""


ENTRIES = (
    # Run as written.
    Entry(r"verl-gradalign (report|cost) .*", run_as_written),
    Entry(r"python -m verl_gradalign\.reference.*", write_reference),
    Entry(r"(VERL_PLATFORM=\w+ )?verl-gradalign doctor.*", examine),
    Entry(r"python -m verl_gradalign\.experiments\.overview .*", overview_of_little),
    # Reduced: fewer problems.
    Entry(
        r"verl-gradalign prepare .*",
        prepare_little,
        ("tests/unit/test_prepare_sources.py::test_every_source_is_covered",),
    ),
    Entry(r"verl-gradalign hold-out .*", hold_out_of_a_copy),
    # Composed and validated, or read and checked; the training itself is covered.
    Entry(rf"([A-Z_]+=\S+ )*python3? -m {re.escape(ENTRY_POINT)} .*", compose_launch, LAUNCHES),
    Entry(
        r"([A-Z_]+=\S+ )*bash recipes/(unreliable|imbalance|low_utility|learnalign_gsm8k)/run\.sh.*",
        compose_script,
        (
            "tests/unit/test_recipes.py::test_verl_and_the_plugin_accept_a_ranking_on_every_number_of_gpus",
            "tests/unit/test_recipes.py::test_the_data_last_for_the_schedule",
        ),
    ),
    Entry(
        r"verl-gradalign compare .* --tune .*",
        accepted("verl_gradalign.experiments.tuned.compare_tuned"),
        (
            "tests/e2e/test_series.py::test_tuned_runs_of_one_series_have_their_own_learning_rates_and_one_budget",
            "tests/unit/test_tuned.py::test_a_comparison_that_is_done_is_tuned_and_summed_up_without_starting_anything",
        ),
    ),
    Entry(
        r"verl-gradalign compare (?!.*--tune ).*",
        accepted("verl_gradalign.experiments.compare.compare"),
        (
            "tests/e2e/test_series.py::test_the_table_and_the_figures_tell_what_was_trained_on",
            "tests/unit/test_experiments.py::test_a_published_regime_runs_its_script_once_per_method_and_seed",
        ),
    ),
    Entry(
        r"verl-gradalign bench .*",
        accepted("verl_gradalign.bench.plan.num_devices"),
        (
            "tests/e2e/test_bench.py::test_the_dry_run_measures_every_part_and_every_claim_holds",
            "tests/distributed/test_bench.py::test_the_first_half_needs_torch_and_transformers_alone",
        ),
    ),
    Entry(
        r"([A-Z_]+=\S+ )*verl-gradalign score .*",
        accepted("verl_gradalign.integration.offline.run.run_scoring"),
        (
            "tests/e2e/test_score.py::test_scores_equal_plain_autograd_on_the_stored_rollouts",
            "tests/e2e/test_score.py::test_the_selected_rows_are_the_best_and_load_as_verls_training_data",
        ),
    ),
    # Covered: continuous integration runs `make lint` and `make test`; a target is known to make.
    Entry(r"make [\w -]+", make_targets, DEMO),
    Entry(
        r"python recipes/quickstart/demo\.py.*",
        help_of_script,
        (*DEMO, "tests/e2e/test_step.py::test_corrupted_share_of_kept_groups_is_below_the_pools"),
    ),
    Entry(
        r"python -m tests\.benchmarks\.\w+.*",
        module_exists,
        ("tests/distributed/test_benchmarks.py::test_every_method_is_measured_on_one_rank_and_on_two",),
    ),
    Entry(
        r"pip install .*",
        installable,
        ("tests/unit/test_plugin.py::test_import_verl_loads_the_plugin_through_its_entry_point",),
    ),
    Entry(r"([A-Z_]+=\S+ )*pytest .*", paths_exist),
)

COMMANDS = [command for page in documentation() for command in commands_of(page)]
# Said within a sentence: often a part of a command, so only its words are checked.
SHOWN = [command for command in COMMANDS if not command.is_inline]
MENTIONED = list({command.text: command for command in COMMANDS if command.is_inline}.values())


def entry_of(command: Command) -> Entry:
    found = [entry for entry in ENTRIES if re.fullmatch(entry.pattern, command.text, re.DOTALL)]
    assert len(found) == 1, (
        f"{command.place}: `{command.text}` is handled by {len(found)} entries of ENTRIES in {__name__}. Remedy: "
        "correct the command, or write the entry that runs it, or as much of it as takes seconds."
    )
    return found[0]


@pytest.mark.parametrize("command", SHOWN, ids=lambda c: c.place)
def test_a_command_that_is_shown_works(command, place, monkeypatch):
    entry_of(command).handle(command, place, monkeypatch)


@pytest.mark.parametrize("command", MENTIONED, ids=lambda c: c.place)
def test_a_command_that_is_mentioned_exists(command, place, monkeypatch):
    words = words_of(command.text)[1]
    if words[0] == "verl-gradalign":
        group = typer.main.get_command(app)
        assert words[1] in group.commands, f"{command.place}: verl-gradalign has no command {words[1]}"
        options = {option for parameter in group.commands[words[1]].params for option in parameter.opts} | {"--help"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options
    elif ENTRY_POINT in words and not command.text.endswith(ENTRY_POINT):
        validate([*OVERRIDES.split(), *words[words.index(ENTRY_POINT) + 1 :]] if OVERRIDES not in words else words)
    elif ENTRY_POINT not in words:
        entry_of(command).handle(command, place, monkeypatch)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.pattern[:40])
def test_what_an_entry_leaves_out_is_covered_by_tests_that_exist(entry):
    for node in entry.covered_by:
        path, _, name = node.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}, node


def test_every_page_with_a_launch_is_looked_at():
    """So that a changed layout of the pages does not leave commands out without a word."""
    pages = {command.page.name for command in SHOWN} | {command.page.parent.name for command in SHOWN}
    assert {"README.md", "launch_script.md", "trusted_set.md", "resume.md", "cost.md", "read_report.md"} <= pages
    assert {"unreliable", "imbalance", "low_utility", "learnalign_gsm8k", "miniatures"} <= pages


def test_a_command_that_nobody_handles_is_refused_with_the_remedy():
    with pytest.raises(AssertionError, match="handled by 0 entries.*Remedy: correct the command, or write the entry"):
        entry_of(Command(ROOT / "README.md", 1, "verl-gradalign invented --now"))
