# SPDX-License-Identifier: Apache-2.0
"""What a launch script would start is seen, and nothing is started."""

import os
import stat
import sys
import time

import pytest

from verl_gradalign.doctor import script
from verl_gradalign.doctor.script import Primary, launch_of, overrides_in

MAIN = "python3 -m verl.trainer.main_ppo"


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a script and returns the launch that it would make."""

    def launch(text, *arguments, name="run.sh"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return launch_of(["bash", str(path), *arguments])

    return launch


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["+gradalign=cosine", "a.b=c"], ("+gradalign=cosine", "a.b=c")),
        (["nonsense=1"], ("nonsense=1",)),
        (["~a.b", "++c=1"], ("~a.b", "++c=1")),
        (["python3", "-m", "verl.trainer.main_ppo", "a=1", "+b=2"], ("a=1", "+b=2")),
        (["uv", "run", "--frozen", "python", "-m", "verl.trainer.main_ppo", "a=1"], ("a=1",)),
        (["torchrun", "--nproc=2", "verl/trainer/main_ppo.py", "a=1"], ("a=1",)),
        (["python", "-m", "verl.trainer.main_ppo", "a=1", "2>&1", "|", "tee", "log"], ("a=1",)),
        (["ray", "job", "submit", "--", "python3", "-m", "verl.trainer.main_ppo", "a=[1,2]"], ("a=[1,2]",)),
        (["bash", "-c", "cd /x && python3 -m verl.trainer.main_ppo 'a=b c' > log"], ("a=b c",)),
        ([], ()),
    ],
)
def test_overrides_are_read_from_whatever_command_holds_them(words, overrides):
    assert launch_of(words).overrides == overrides


def test_variables_before_a_command_are_its_own(monkeypatch):
    launch = launch_of(["VERL_PLATFORM=cpu", "python", "-m", "verl.trainer.main_ppo", "seed=1"])
    assert launch.overrides == ("seed=1",) and launch.variables == {"VERL_PLATFORM": "cpu"}


def test_hydras_options_choose_the_configuration():
    launch = launch_of([*MAIN.split(), "--config-path=conf", "--config-name", "mine.yaml", "a=1", "-cd", "other"])
    assert launch.overrides == ("a=1",) and launch.primary == Primary("conf", "mine", "other")
    with pytest.raises(ValueError, match="--response-tokens-of: no option"):
        launch_of(["a=1", "--response-tokens-of"])
    with pytest.raises(ValueError, match="--config-name: has no value"):
        launch_of(["--config-name"])


def test_a_scripts_arguments_are_those_that_bash_makes(run, tmp_path):
    launch = run(
        f"""set -xeuo pipefail
        export WANDB_MODE=offline
        TRAIN=$HOME/data/train.parquet
        SIZES=(data.train_batch_size=$((4 * 16)) "data.note=two words")
        mkdir -p "{tmp_path}/logs"; cd "{tmp_path}/logs"
        {MAIN} data.train_files="$TRAIN" "${{SIZES[@]}}" "$@" 2>&1 | tee log.txt
        """,
        "+gradalign=cosine",
    )
    home = os.path.expanduser("~")
    assert launch.overrides == (
        f"data.train_files={home}/data/train.parquet",
        "data.train_batch_size=64",
        "data.note=two words",
        "+gradalign=cosine",
    )
    assert launch.folder == str(tmp_path / "logs") and launch.variables["WANDB_MODE"] == "offline"
    assert not {"PATH", "HOME", "BASH_ENV", "http_proxy"} & set(launch.variables)


def test_modules_are_found_where_the_script_has_them_found(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/own")
    assert "PYTHONPATH" not in run(f"{MAIN} a=1").variables
    assert run(f"export PYTHONPATH=/lib:$PYTHONPATH\n{MAIN} a=1").variables["PYTHONPATH"] == "/lib:/own"


@pytest.mark.parametrize(
    "how",
    [
        "uv run --frozen python -m verl.trainer.main_ppo a=1",
        "exec python3 -m verl.trainer.main_ppo a=1",
        "ray job submit --working-dir . -- python3 -m verl.trainer.main_ppo a=1",
        "nohup python3 -m verl.trainer.main_ppo a=1 & wait",
        "srun --nodes=2 bash -c 'python3 -m verl.trainer.main_ppo a=1'",
        f"{sys.executable} -m verl.trainer.main_ppo a=1",
        'CMD=(python3 -m verl.trainer.main_ppo a=1); "${CMD[@]}"',
        "n=$(python3 -c 'print(3 - 2)'); python3 -m verl.trainer.main_ppo a=$n",
        "until ray status; do sleep 100; done; sleep 100; pip install x; python3 -m verl.trainer.main_ppo a=1",
    ],
)
def test_every_way_to_start_is_seen_and_nothing_is_started(run, how):
    began = time.monotonic()
    assert run(how).overrides == ("a=1",)
    assert time.monotonic() - began < 15


def test_an_activated_environments_python_does_not_start(run, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n", encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "activate").write_text(f'export PATH="{tmp_path}/bin:$PATH"\n', encoding="utf-8")
    assert run(f"source {tmp_path}/activate\n{MAIN} a=1").overrides == ("a=1",)
    assert not (tmp_path / "started").exists()


def test_what_a_script_deletes_installs_and_fetches_is_not_done(run, tmp_path):
    (tmp_path / "kept").write_text("x", encoding="utf-8")
    run(f"rm -rf {tmp_path}/kept; mv {tmp_path}/kept {tmp_path}/gone; echo x > $HOME/.doctor-test\n{MAIN} a=1")
    assert (tmp_path / "kept").exists()
    assert not os.path.exists(os.path.expanduser("~/.doctor-test"))


def test_of_several_launches_the_first_is_taken_and_the_others_are_counted(run):
    launch = run(f"for seed in 1 2 3; do {MAIN} seed=$seed; done")
    assert launch.overrides == ("seed=1",) and launch.num_others == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("echo hello", ["no call of verl.trainer.main_ppo was seen", "hello"]),
        ('set -u\necho "$DATA_DIR"\n' + MAIN, ["no call of", "DATA_DIR: unbound variable"]),
        ("python3 -m recipe.dapo.main_dapo a=1", ["it starts recipe.dapo.main_dapo"]),
        ("python3 train.py", ["programs called: python3"]),
    ],
)
def test_a_script_without_a_launch_is_refused_with_what_was_seen(run, text, parts):
    with pytest.raises(ValueError, match="Remedy") as refused:
        run(text)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_a_script_that_does_not_end_is_ended(run, monkeypatch):
    monkeypatch.setattr(script, "TIME_LIMIT_S", 1.0)
    with pytest.raises(ValueError, match="no call of"):
        run("while true; do :; done")


def test_a_script_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"nowhere\.sh"):
        launch_of(["./nowhere.sh"])


def test_words_of_a_shell_end_the_overrides():
    assert overrides_in(["verl.trainer.main_ppo", "a=1", "2>/dev/null", "b=2"]) == ["a=1"]
    assert overrides_in(["python", "train.py"]) is None
