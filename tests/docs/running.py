# SPDX-License-Identifier: Apache-2.0
"""How a command of the documentation is run, or as much of it as takes seconds. Nothing is trained.

Each function takes the command, the folder in which the files that it speaks of are (also the current directory), and
pytest's monkeypatch; it raises if the command would not work.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import verl  # noqa: F401  (loads the plugin, which makes +gradalign and +regime known)
from click.testing import Result
from hydra import compose, initialize_config_module
from typer.testing import CliRunner
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from tests.docs.documents import ROOT, YOUR_OVERRIDES, Command
from tests.unit.curves import write_comparison
from verl_gradalign.cli import app
from verl_gradalign.data.prepare import REGIMES
from verl_gradalign.data.sources import SOURCES
from verl_gradalign.integration.checks import check_data, check_verl_config, read_config
from verl_gradalign.probe import layer_rules

# Stands for "<your overrides>": what a launch script says at least. No model is looked at.
OVERRIDES = (
    "data.train_files=train.parquet data.val_files=test.parquet data.train_batch_size=64 algorithm.adv_estimator=grpo "
    "actor_rollout_ref.model.path=tiny actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.rollout.name=vllm "
    "actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.use_dynamic_bsz=true "
    "actor_rollout_ref.rollout.n=8 trainer.default_local_dir=checkpoints/project/run "
    "reward.custom_reward_function.path=pkg://verl_gradalign.data.rewards "
    "reward.custom_reward_function.name=compute_score"
)
MAX_PROBLEMS = 12
"""Of a source that `prepare` is asked for here."""
OF_THE_MACHINE = {"environment", "hardware"}
ENTRY_POINT = "verl.trainer.main_ppo"


def words_of(text: str) -> tuple[dict[str, str], list[str]]:
    """Return the variables before a command, and its words."""
    words = shlex.split(YOUR_OVERRIDES.sub(lambda _: OVERRIDES, text), comments=True)
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def invoke(arguments: list[str], *codes: int) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (codes or (0,)), f"exit code {result.exit_code}: {result.output}\n{result.exception!r}"
    return result


def run_as_written(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    invoke(words_of(command.text)[1][1:])


def examine(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """`doctor` may find that this machine is not what the configuration is for; all else must be in order."""
    words = words_of(command.text)[1]
    (place / "run.sh").write_text(f'python3 -m {ENTRY_POINT} {OVERRIDES} "$@"\n', encoding="utf-8")
    found = json.loads(invoke([words[1], "--json", *words[2:]], 0, 1).stdout)["findings"]
    errors = [finding for finding in found if finding["level"] == "error"]
    assert found and {error["area"] for error in errors} <= OF_THE_MACHINE, errors


def prepare_little(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """Run with few problems, of local files; a regime's own numbers are replaced by options."""
    words = words_of(command.text)[1]
    if "--help" in words:
        invoke(words[1:])
        return
    preset = REGIMES[words[words.index("--regime") + 1]] if "--regime" in words else None
    for split in ("train", "trusted", "test") if preset else ():
        if f"--{split}" not in words:
            words += [word for request in getattr(preset, split) for word in (f"--{split}", request)]
    small = [re.sub(r"^(\w+:)(first-)?\d+$", rf"\g<1>\g<2>{MAX_PROBLEMS}", word) for word in words[1:]]
    origins = [f"--from={name}={place / 'sources' / name}" for name in SOURCES if name != "countdown"]
    output = Path(words[words.index("--output") + 1])
    patch.chdir(tempfile.mkdtemp(dir=place))
    invoke([*small, *origins])
    assert (output / "train.parquet").exists() and (output / "manifest.json").exists()


def hold_out_of_a_copy(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """Run as written, in a folder of its own: several pages write to the same output."""
    folder = Path(tempfile.mkdtemp(dir=place))
    shutil.copy(place / "train.parquet", folder)
    patch.chdir(folder)
    words = words_of(command.text)[1]
    invoke(words[1:])
    assert "--help" in words or (Path(words[words.index("--output") + 1]) / "trusted.parquet").exists()


def accepted(function: str) -> Callable[[Command, Path, pytest.MonkeyPatch], None]:
    """Return a handler that goes as far as the command itself: options are read and checked, `function` not called."""

    def handle(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
        module, _, name = function.rpartition(".")

        def note(*_: object) -> None:
            raise ValueError("accepted")

        words = words_of(command.text)[1][1:]
        if "--help" in words:
            invoke(words)
            return
        patch.setattr(f"{module}.{name}", note)
        assert "accepted" in invoke(words, 2).output

    return handle


def compose_launch(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """Compose what verl's entry point would be given, and check it as that and the trainer do before workers start."""
    variables, words = words_of(command.text)
    assert set(variables) <= {"VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "VERL_FILE_LOGGER_PATH"}
    for module in filter(None, variables.get("VERL_USE_EXTERNAL_MODULES", "").split(",")):
        patch.syspath_prepend(place)
        patch.setattr(layer_rules, "LAYER_RULES", dict(layer_rules.LAYER_RULES))
        importlib.import_module(module)
    validate(words[words.index(ENTRY_POINT) + 1 :])


def validate(overrides: list[str]) -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there is no critic
        validate_config(config, need_reference_policy(config), need_critic(config))
    if config.trainer.v1.trainer_mode.startswith("gradalign"):
        own = read_config(config)
        check_verl_config(own, config)
        check_data(own, config)


def compose_script(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """Run the launch script with a stand-in for Python that notes its arguments, and validate those."""
    variables, words = words_of(command.text)
    words = words[1:] if words[0] == "bash" else words
    told = place / "arguments"
    own = {"PYTHON": str(place / "python"), "ARGUMENTS": str(told), "DATA_DIR": str(place)}
    clean = {key: value for key, value in os.environ.items() if key not in ("METHOD", "SEED", "NUM_GPUS", "MODEL")}
    script = [str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(["bash", *script], env=clean | own | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    arguments = json.loads(told.read_text(encoding="utf-8"))
    assert arguments[:2] == ["-m", ENTRY_POINT]
    # The files here are small; what the published pools must hold is checked by the entry's proof.
    patch.setattr(sys.modules[__name__], "check_data", lambda *_: None)
    validate(arguments[2:])


def make_targets(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """See that make knows what to do, without doing it."""
    words = words_of(command.text)[1]
    done = subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def installable(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """See that the name and the extras are the distribution's."""
    extras = set(importlib.metadata.metadata("verl-gradalign").get_all("Provides-Extra"))
    for requirement in [word for word in words_of(command.text)[1][2:] if not word.startswith("-")]:
        name, asked = re.fullmatch(r"([\w.-]+?)(?:\[([\w,]+)\])?", requirement).groups()
        assert name in ("verl-gradalign", ".") and set(filter(None, (asked or "").split(","))) <= extras


def write_reference(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, *words_of(command.text)[1][1:], "--output", str(place / "pages")], check=False
    )
    assert done.returncode == 0


def overview_of_little(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """Run as written, on comparisons of known numbers."""
    words = words_of(command.text)[1]
    for folder in words[3 : words.index("--output")]:
        write_comparison(place / folder)
    done = subprocess.run([sys.executable, *words[1:]], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and (place / words[-1] / "overview.png").exists(), done.stderr


def help_of_script(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    """See that a script knows the options."""
    words = words_of(command.text)[1]
    shown = [sys.executable, words[1], "--help"]
    done = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words if word.startswith("--"))


def module_exists(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec(words_of(command.text)[1][2])


def paths_exist(command: Command, place: Path, patch: pytest.MonkeyPatch) -> None:
    variables, words = words_of(command.text)
    paths = [ROOT / word for word in words[1:] if not word.startswith("-")]
    assert paths and all(path.exists() for path in paths)
    assert all(name in paths[0].read_text(encoding="utf-8") for name in variables)
