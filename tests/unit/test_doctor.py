# SPDX-License-Identifier: Apache-2.0
"""The doctor on real configurations, data and models: a good one passes, and every mistake has its finding."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packaging.specifiers import SpecifierSet
from transformers import GPT2Config
from typer.testing import CliRunner

from verl_gradalign.cli import app
from verl_gradalign.data.tasks import write_task_files
from verl_gradalign.doctor.data import AT_RESPONSES, RELIABILITY, reliability_of
from verl_gradalign.doctor.machine import REQUIRED, examine_environment, examine_folders
from verl_gradalign.findings import Finding, Findings
from verl_gradalign.integration import hub
from verl_gradalign.toy.model import build_tiny_model

ROOT = Path(__file__).parents[2]
REFILLS = "trainer.v1.sampler.sync_refill_failed_groups"
"""A key that is refused when it is true."""
runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and task files beside it."""
    root = tmp_path_factory.mktemp("doctor")
    write_task_files(root / "data", num_pool=120, num_trusted=24, num_test=8, seed=0)
    build_tiny_model(root / "model")
    return root


@pytest.fixture
def command(place, tmp_path, monkeypatch):
    """Return a function that gives the doctor's answer to the quickstart's configuration with further overrides."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.chdir(tmp_path)
    files = {path.stem: path for path in (place / "data").iterdir()}

    def overrides(*further):
        return [
            *("+platform=cpu", "+gradalign=cosine", "+regime=quickstart"),
            f"gradalign.validation.files={files['trusted']}",
            f"data.train_files={files['pool']}",
            f"data.val_files={files['test']}",
            f"actor_rollout_ref.model.path={place / 'model'}",
            f"trainer.default_local_dir={tmp_path / 'run'}",
            *further,
        ]

    def answer(*further, without=()):
        given = [o for o in overrides(*further) if not o.startswith(tuple(without))] if without else overrides(*further)
        result = runner.invoke(app, ["doctor", "--json", "--", *given])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        found = json.loads(result.stdout)
        assert result.exit_code == (0 if found["ok"] else 1)
        return found

    answer.overrides, answer.files = overrides, files
    return answer


def errors(answer):
    return [f for f in answer["findings"] if f["level"] == "error"]


def only_error(answer, *parts):
    """The one error of the answer, which names the parts in its message and has a remedy."""
    (error,) = errors(answer)
    assert all(part in error["message"] for part in parts), error
    assert error["remedy"], error
    return error


def texts(answer, area, level):
    return " | ".join(f["message"] for f in answer["findings"] if (f["area"], f["level"]) == (area, level))


def test_a_good_configuration_has_no_errors_and_a_cost(command):
    answer = command()
    assert answer["ok"] and not errors(answer), errors(answer)
    assert "verl accepts the configuration" in texts(answer, "configuration", "ok")
    assert "score cosine with schedule step" in texts(answer, "configuration", "ok")
    assert "Qwen2ForCausalLM can be scored with estimator ghost" in texts(answer, "model", "ok")
    assert "24 problems x 8 responses = 192" in texts(answer, "trusted set", "ok")
    assert "trusted set: 5 of 5 data sources" in texts(answer, "reward", "ok")
    assert "120 problems, 40 steps of 4 (trainer.total_training_steps); as candidates" in texts(
        answer, "train files", "note"
    )
    cost = answer["cost"]
    assert cost["candidates"] == 4 * 4 * 8 and cost["trusted"] == 24 * 8 and cost["setting"]["compute_bytes"] == 4
    assert cost["num_parameters"] == cost["setting"]["shape"]["exact_parameters"]
    assert "of this machine's free memory" in texts(answer, "cost", "ok")


def test_the_command_starts_no_ray_and_prints_only_json_to_standard_output(command, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "verl_gradalign.cli", "doctor", "--json", "--", *command.overrides()],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    answer = json.loads(done.stdout)
    assert set(answer) == {"findings", "cost", "ok"} and answer["ok"]
    assert all(set(finding) == {"area", "level", "message", "remedy"} for finding in answer["findings"])
    assert "verl has loaded the plugin" in texts(answer, "plugin", "ok")
    assert not (tmp_path / "run").exists() and "ray init" not in done.stderr


def test_what_is_wrong_and_the_cost_are_shown_and_everything_if_asked(command):
    faults = (f"{REFILLS}=true", "gradalign.validation.n=2")
    short = runner.invoke(app, ["doctor", *command.overrides(*faults)], env={"COLUMNS": "250"})
    assert short.exit_code == 1, short.output
    lines = [line for line in short.stdout.splitlines() if line.startswith("│ ") and "area" not in line]
    levels = [line.split()[1] for line in lines]
    assert levels[0] == "error" and f"{REFILLS}=True" in lines[0]
    assert not {"ok", "note"} & set(levels)
    assert "1 errors, " in short.stdout and "--verbose shows them" in short.stdout
    assert "responses generated" in short.stdout
    assert "plain verl" in short.stdout and "schedule forecast" in short.stdout
    whole = runner.invoke(app, ["doctor", "--verbose", *command.overrides(*faults)], env={"COLUMNS": "250"})
    assert "verl accepts the configuration" in whole.stdout and "Python 3." in whole.stdout
    assert whole.stdout.index(f"{REFILLS}=True") < whole.stdout.index("verl accepts")


def test_a_script_and_a_whole_command_are_examined_as_their_overrides_are(command, tmp_path, monkeypatch):
    words = " ".join(command.overrides()[:-1])
    (tmp_path / "place").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "doctors_grader.py").write_text("from verl_gradalign.data.rewards import compute_score")
    script = tmp_path / "run.sh"
    script.write_text(
        f"set -eu\nexport VERL_PLATFORM=cpu WANDB_MODE=offline PYTHONPATH={tmp_path}/lib\ncd {tmp_path}/place\n"
        f"RUN=$(python3 -c 'print(\"run\" * 2)')\n"
        f'python3 -m verl.trainer.main_ppo {words} trainer.default_local_dir=$RUN trainer.logger=[wandb] "$@"\n',
        encoding="utf-8",
    )
    monkeypatch.delenv("VERL_PLATFORM")
    further = (
        "trainer.v1.sampler.sync_refill_failed_groups=true",
        "reward.custom_reward_function.path=pkg://doctors_grader",
    )
    result = runner.invoke(app, ["doctor", "--json", "--", "bash", str(script), *further])
    answer = json.loads(result.stdout)
    only_error(answer, f"{REFILLS}=True")
    assert "trainer.default_local_dir=runrun can be written" in texts(answer, "folders", "ok")
    assert "WANDB_MODE=offline" in texts(answer, "logging", "note")
    assert "VERL_PLATFORM" not in os.environ and Path.cwd() == tmp_path  # as they were
    whole = f"VERL_PLATFORM=cpu python -m verl.trainer.main_ppo {words} {REFILLS}=true".split()
    only_error(
        json.loads(runner.invoke(app, ["doctor", "--json", *whole]).stdout),
        f"{REFILLS}=True",
    )


def test_a_configuration_of_ones_own_is_found_by_hydras_options(command, tmp_path):
    (tmp_path / "conf").mkdir()
    text = "defaults: [ppo_trainer, _self_]\nhydra:\n  searchpath: [pkg://verl.trainer.config]\ndata:\n  seed: 7\n"
    (tmp_path / "conf" / "mine.yaml").write_text(text, encoding="utf-8")
    options = [f"--config-path={tmp_path / 'conf'}", "--config-name", "mine"]
    answer = command(*options)
    assert answer["ok"], errors(answer)
    only_error(command(*options, "data.sead=8"), "data.sead")
    result = runner.invoke(app, ["doctor", "--json", "--", *command.overrides("--config-name=nowhere")])
    assert "nowhere" in " ".join(f["message"] for f in errors(json.loads(result.stdout)))


def test_commands_that_start_no_training_are_bad_usage(tmp_path):
    (tmp_path / "other.sh").write_text("python3 -m recipe.dapo.main_dapo a=1", encoding="utf-8")
    result = runner.invoke(app, ["doctor", "--", "bash", str(tmp_path / "other.sh")])
    assert result.exit_code == 2 and "recipe.dapo.main_dapo" in result.output
    assert runner.invoke(app, ["doctor", "+gradalign=random", "--vrebose"]).exit_code == 2


def test_without_overrides_it_looks_at_the_machine_alone(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    result = runner.invoke(app, ["doctor", "--json"])
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["cost"] is None
    assert {f["area"] for f in answer["findings"]} == {"environment", "hardware", "plugin"}
    for package in REQUIRED:
        assert f"{package} " in texts(answer, "environment", "ok")


def test_bad_usage_has_exit_code_2():
    assert runner.invoke(app, ["doctor", "--response-tokens", "many"]).exit_code == 2


def test_required_versions_are_those_of_setup():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    asked = dict(re.findall(r'"([A-Za-z-]+)(?:\[[a-z0-9_,]+\])?((?:[<>=]=?[0-9.]+,?)+)"', setup))
    for package, wanted in REQUIRED.items():
        if wanted:
            assert SpecifierSet(asked[package]) == SpecifierSet(wanted), package


def test_an_override_that_does_not_compose_is_an_error(command):
    only_error(command("nonsense=1"), "nonsense")


def test_a_mandatory_key_without_a_value_is_named_once_with_its_usual_value(command):
    (found,) = errors(command("actor_rollout_ref.rollout.name=???"))
    assert found["message"].startswith("actor_rollout_ref.rollout.name has no value")
    assert found["remedy"] == "set actor_rollout_ref.rollout.name=vllm"


def test_a_reward_function_of_ones_own_that_is_not_written_yet_is_called_by_its_error(command, tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text("def grade(**_):\n    raise NotImplementedError('grading of proofs')\n", encoding="utf-8")
    own = (f"reward.custom_reward_function.path={path}", "reward.custom_reward_function.name=grade")
    found = [f for f in errors(command(*own)) if f["area"] == "reward"]
    assert found and all("NotImplementedError: grading of proofs" in f["message"] for f in found)


def test_all_that_is_wrong_is_found_at_once(command):
    found = errors(
        command(
            "actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov",
            f"{REFILLS}=true",
            "gradalign.oversample=60",
            "trainer.default_local_dir=/proc/run",
        )
    )
    text = " | ".join(f["message"] for f in found)
    for key in ("loss_mode", "sync_refill", "gradalign.oversample", "default_local_dir"):
        assert key in text
    assert len(found) == 4


def test_selection_that_is_not_switched_on_is_an_error(command):
    answer = command(without=("+gradalign", "gradalign.", "+regime"))
    assert "selection is not switched on" in " ".join(f["message"] for f in errors(answer))


def test_a_cpu_platform_without_its_variable_is_an_error(command, monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM")
    found = {f["area"]: f for f in errors(command())}
    assert "VERL_PLATFORM" in found["hardware"]["message"] and "VERL_PLATFORM=cpu" in found["environment"]["remedy"]


def test_an_engine_that_is_not_installed_is_an_error(command):
    error = only_error(command("actor_rollout_ref.rollout.name=sglang"), "sglang is not installed")
    assert "pip install 'verl[sglang]'" in error["remedy"]


def test_a_layer_without_a_rule_is_named_and_backward_accepts_it(command, place):
    folder = place / "gpt2"
    if not folder.exists():
        build_tiny_model(folder)
        GPT2Config(vocab_size=261, n_embd=64, n_layer=1, n_head=2, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
                   attn_pdrop=0.0, architectures=["GPT2LMHeadModel"]).save_pretrained(folder)  # fmt: skip
    path = f"actor_rollout_ref.model.path={folder}"
    error = only_error(command(path), "c_attn.weight (Conv1D)")
    assert "gradalign.estimator=backward" in error["remedy"]
    answer = command(path, "gradalign.estimator=backward")
    assert answer["ok"] and answer["cost"] is None
    assert "cost of a step is not estimated" in texts(answer, "model", "note")


def on_a_login_node(command, monkeypatch, *further):
    """The answer for a configuration of GPUs where there is none, and no engine."""
    monkeypatch.delenv("VERL_PLATFORM")
    given = [o for o in command.overrides(*further) if o != "+platform=cpu"]
    return json.loads(runner.invoke(app, ["doctor", "--json", "--", *given]).stdout)


@pytest.mark.parametrize("further", [(), ("actor_rollout_ref.model.lora_rank=8",)])
def test_a_login_node_lacks_what_the_machine_that_trains_has(command, monkeypatch, further):
    answer = on_a_login_node(command, monkeypatch, "actor_rollout_ref.rollout.name=vllm", *further)
    assert answer["ok"], errors(answer)
    assert "vllm is not installed here" in texts(answer, "environment", "note")
    assert "no GPU is seen here" in texts(answer, "hardware", "warning")


@pytest.mark.parametrize("score", ["random", "accuracy_band", "accuracy_greedy"])
def test_scores_without_gradients_are_right_on_any_engine(command, monkeypatch, score):
    engine = ("model_engine=megatron", "actor_rollout_ref.rollout.name=vllm", "critic.enable=false")
    answer = on_a_login_node(command, monkeypatch, *engine, f"gradalign.score={score}")
    assert answer["ok"], errors(answer)
    assert answer["cost"] is not None


def test_a_hub_id_without_a_network_is_one_error_in_seconds(command, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.hub_answers.cache_clear()
    began = time.monotonic()
    error = only_error(command("actor_rollout_ref.model.path=someone/nowhere"), "actor_rollout_ref.model.path=someone")
    assert time.monotonic() - began < 20 and "hf download someone/nowhere" in error["remedy"]
    hub.hub_answers.cache_clear()


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_path_too_long_for_rays_sockets_is_a_warning(monkeypatch, variable):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    findings = Findings()
    examine_folders(findings)
    assert findings.all == []
    monkeypatch.setenv(variable, "/tmp/" + "x" * 60)
    examine_folders(findings)
    (warning,) = [f for f in findings.all if f.level == "warning"]
    assert variable in warning.message and "Ray cannot start" in warning.message
    most = int(re.search(r"(\d+) bytes or less", warning.remedy)[1])
    monkeypatch.setenv(variable, "/tmp/" + "x" * (most - 5))
    examine_folders(mended := Findings())
    assert mended.all == []


def test_a_data_set_of_ones_own_is_read_as_verl_reads_it(command, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from verl.utils.dataset.rl_dataset import RLHFDataset\n"
        "class Mine(RLHFDataset):\n"
        "    def _read_files_and_tokenize(self):\n"
        "        super()._read_files_and_tokenize()\n"
        "        self.dataframe = self.dataframe.select(range(2, len(self.dataframe)))\n",
        encoding="utf-8",
    )
    answer = command(f"data.custom_cls.path={path}", "data.custom_cls.name=Mine")
    assert answer["ok"], errors(answer)
    assert "118 problems" in texts(answer, "train files", "note")


def test_rows_that_repeat_are_counted(command, tmp_path):
    rows = [json.dumps(row) for row in pq.read_table(command.files["trusted"]).to_pylist()[:4]]
    path = tmp_path / "trusted.jsonl"
    path.write_text("\n".join(rows * 6), encoding="utf-8")
    answer = command(f"gradalign.validation.files={path}")
    assert "24 rows hold 4 distinct problems, one of them 6 times" in texts(answer, "trusted set", "warning")
    assert "4 problems x 8 responses = 32" in texts(answer, "trusted set", "warning")


def test_an_empty_label_is_no_fault(command, tmp_path):
    def without_info(row):
        if row["extra_info"]["index"] == 3:
            row["extra_info"] = None
        return row

    path = changed(command, "pool", tmp_path, without_info)
    answer = command(f"data.train_files={path}", "gradalign.log.columns=[family]", "gradalign.score=random")
    assert not [f for f in errors(answer) if f["area"] == "train files"]


def test_adapters_are_built_and_their_cost_is_left_out(command):
    answer = command("actor_rollout_ref.model.lora_rank=4")
    assert answer["ok"], errors(answer)
    assert "of them trained" in texts(answer, "model", "note") and answer["cost"] is None
    assert "adapters" in texts(answer, "cost", "note")


def changed(command, name, tmp_path, change):
    """A copy of a data file with its rows changed."""
    table = pq.read_table(command.files[name])
    rows = [change(copy.deepcopy(row)) for row in table.to_pylist()]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_missing_answers_are_counted(command, tmp_path):
    def without(row):
        row["reward_model"]["ground_truth"] = None
        return row

    path = changed(command, "trusted", tmp_path, without)
    answer = command(f"gradalign.validation.files={path}")
    assert "24 of 24 problems have no reward_model.ground_truth" in texts(answer, "trusted set", "warning")


def test_trusted_problems_that_are_trained_on_are_an_error(command):
    only_error(command(f"gradalign.validation.files={command.files['pool']}"), "also stand in data.train_files")


def test_a_file_that_is_not_there_is_named(command):
    only_error(command("gradalign.validation.files=nowhere.parquet"), "nowhere.parquet", "no such file")


def test_prompts_that_are_too_long_are_an_error_unless_they_are_left_out(command):
    assert "longer than data.max_prompt_length=14" in " ".join(
        f["message"] for f in errors(command("data.max_prompt_length=14"))
    )
    answer = command("data.max_prompt_length=14", "data.filter_overlong_prompts=true")
    assert "will be left out" in texts(answer, "trusted set", "warning")


def test_few_trusted_responses_are_a_warning_that_says_how_noisy(command):
    answer = command("gradalign.validation.n=2")
    assert "24 problems x 2 responses = 48" in texts(answer, "trusted set", "warning")
    assert reliability_of(AT_RESPONSES) == RELIABILITY and reliability_of(128) == pytest.approx(0.65, abs=0.01)


def test_wandb_without_a_login_is_a_warning(command, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "there is no login" in texts(command("trainer.logger=[wandb]"), "logging", "warning")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE=offline" in texts(command("trainer.logger=[wandb]"), "logging", "note")


def test_a_run_that_would_go_on_is_said(command, tmp_path):
    (tmp_path / "run" / "global_step_3").mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3", encoding="utf-8")
    assert "would go on from" in texts(command(), "folders", "note")


def test_other_schedules_and_scores_have_a_cost(command):
    random = command("gradalign.score=random")["cost"]
    assert random["ratios"]["rollout"] == 1 and random["trusted"] == 0
    rounds = command("gradalign.schedule=round", "gradalign.curriculum.num_candidates=80")["cost"]
    assert rounds["candidates"] == 80 * 8 / 10
    once = command("gradalign.schedule=once", "gradalign.curriculum.keep=0.5", "gradalign.curriculum.warmup_steps=4")
    assert once["cost"]["candidates"] == 120 * 8 / 40


def test_a_forecast_has_its_own_cost(command):
    """4 problems x 8 responses, a tenth of 24 x 8 trusted ones; 24 + 4 x 32 bytes of each of 120 problems are kept."""
    in_update = ("gradalign.score=dot", "gradalign.measure=update", "gradalign.estimator=low_rank")
    answer = command("gradalign.schedule=forecast", *in_update)
    cost = answer["cost"]
    assert not errors(answer) and (cost["candidates"], cost["trusted"], cost["generated"]) == (32, 19.2, 51.2)
    assert cost["flops"]["features"] > 0 and cost["memory"]["score"] == 0 < cost["memory"]["replicated"]
    kept = 24 * 8 * 5 * (cost["setting"]["prompt_tokens"] + cost["setting"]["response_tokens"]) * 48
    assert cost["kept_bytes"] == pytest.approx(kept + 120 * (24 + 128))
    rewards = command("gradalign.schedule=forecast", "gradalign.score=accuracy_greedy", "gradalign.validation.files=[]")
    assert not errors(rewards) and rewards["cost"]["ratios"]["rollout"] == 1
    assert rewards["cost"]["flops"]["direction"] == rewards["cost"]["flops"]["scores"] == 0


def test_a_refusal_is_split_into_message_and_remedy():
    findings = Findings()
    findings.refusal("data", ValueError("a=1: is wrong. Remedy: set a=2."))
    with findings.refusals("model"):
        raise KeyError("weight")
    assert findings.all == [
        Finding("data", "error", "a=1: is wrong.", "set a=2."),
        Finding("model", "error", "KeyError: 'weight'", ""),
    ]


def test_a_plugin_that_is_switched_off_is_an_error(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    findings = Findings()
    examine_environment(findings)
    assert any("VERL_USE_EXTERNAL_PLUGINS=none" in f.message for f in findings.all if f.level == "error")


def test_gpus_are_counted_and_one_in_use_is_a_warning(monkeypatch):
    """No GPU is needed: torch's answers are those of a machine with two."""
    memory = [(80e9, 80e9), (20e9, 80e9)]
    answers = {"is_available": lambda: True, "device_count": lambda: 2, "mem_get_info": memory.__getitem__}
    for name, answer in {**answers, "get_device_name": lambda _: "H100"}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", answer)
    findings = Findings()
    assert examine_environment(findings).gpu_gb == 80
    found = {f.message: f.level for f in findings.all if f.area == "hardware"}
    assert any(text.startswith("2 x H100, 80 GB") for text in found)
    assert found["GPU 1: 20 of 80 GB are free"] == "warning"


def test_help_has_examples():
    for name in ("doctor", "cost"):
        result = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0 and f"verl-gradalign {name} " in result.stdout and "Examples" in result.stdout


def test_what_scores_leave_out_of_advantages_is_a_warning(command):
    found = texts(command("algorithm.use_kl_in_reward=True"), "configuration", "warning")
    assert "use_kl_in_reward=True: scores leave the KL penalty out" in found
    found = texts(command("algorithm.adv_estimator=remax"), "configuration", "warning")
    assert "adv_estimator=remax: its advantages are not known" in found


def test_ranks_that_share_rows_count_as_one_for_the_updates_batches(command):
    actor = "actor_rollout_ref.actor.ppo_mini_batch_size=6"
    keys = ("trainer.n_gpus_per_node=8", actor, "data.train_batch_size=6", "actor_rollout_ref.rollout.n=5")
    size = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size"
    two, four = (texts(command(*keys, f"{size}={n}"), "configuration", "error") for n in (2, 4))
    assert "cannot be divided among 4 data-parallel ranks" in two and "cannot be divided" not in four
