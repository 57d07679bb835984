# SPDX-License-Identifier: Apache-2.0
"""What the kit starts verl with on GPUs, which no test can run: verl and the plugin accept it."""

import sys
from pathlib import Path

import pytest

from tests.docs.running import validate
from verl_gradalign.bench import grpo
from verl_gradalign.bench.grpo import NUM_STEPS, Problems, overrides_of, selection, summary
from verl_gradalign.bench.made_up_rewards import even_length, first_byte
from verl_gradalign.bench.options import Options
from verl_gradalign.data.tasks import write_task_files
from verl_gradalign.experiments.launches import start
from verl_gradalign.toy.model import build_tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_task_files(tmp_path_factory.mktemp("data"), num_pool=640, num_trusted=16, num_test=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=False)


@pytest.mark.parametrize("has_flash", [False, True])
@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
@pytest.mark.parametrize("is_own", [False, True])
def test_verl_and_the_plugin_accept_both_runs(tmp_path, files, model, monkeypatch, is_own, num_devices, has_flash):
    monkeypatch.setattr("verl_gradalign.bench.grpo.find_spec", lambda name: object() if has_flash else None)
    problems = Problems(model, "even_length" if is_own else "first_byte", 256 if is_own else 64, 256, not is_own)
    options = Options(tmp_path, num_devices=num_devices)
    plain = overrides_of(options, problems, files, tmp_path / "run", NUM_STEPS)
    validate(plain)
    validate([*plain, *selection(files)])
    assert ("trainer.n_gpus_per_node=2" in plain) == (num_devices in (2, 3))  # what divides every batch
    assert any("attn_implementation=sdpa" in word for word in plain) != has_flash


def test_the_rewards_are_what_verl_loads_and_tell_responses_apart():
    assert [first_byte("tasks", text, "") for text in ("a\u00e9", "\u00e9a", "")] == [1.0, 0.0, 0.0]
    assert [even_length("tasks", text, "") for text in ("ab", "abc", "")] == [1.0, 0.0, 1.0]


def test_a_run_that_made_fewer_steps_is_not_summed_up(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "data": {"timing_s/step": 2.0}}\n', encoding="utf-8")
    assert summary(path, 1)["step_s"] == 2.0
    with pytest.raises(RuntimeError, match="holds 1 steps of 2"):
        summary(Path(path), 2)


def test_a_launch_whose_port_was_taken_is_started_once_more(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "POLL_S", 0.01)
    started = []

    def launch_of(*scripts):
        started.clear()

        def launch(which):
            started.append(which)
            return start([sys.executable, "-c", scripts[len(started) - 1]], tmp_path / "run.log", tmp_path, {})

        return launch

    taken = "import sys; sys.exit('bind: EADDRINUSE')"
    assert set(grpo._wait(["with"], launch_of(taken, "pass"))) == {"with"} and len(started) == 2
    with pytest.raises(RuntimeError, match="(?s)verl, with, ended with 1; all it said is in .*EADDRINUSE"):
        grpo._wait(["with"], launch_of(taken, taken))
    with pytest.raises(RuntimeError, match="(?s)ended with 1.*no such reward"):
        grpo._wait(["with"], launch_of("import sys; sys.exit('no such reward')"))
    assert len(started) == 1
