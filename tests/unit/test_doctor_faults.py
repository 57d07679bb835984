# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  (a fault is one line of its table)
"""Configurations with one fault each: the doctor names the fault, and its remedy, once applied, leaves no error.

All share one composed configuration, one tiny model and small files; a fault changes some keys of it.
"""

import contextlib
import copy
import io
import json
import re
import shutil
import time
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import verl  # noqa: F401  (loads the plugin)
from omegaconf import OmegaConf
from transformers import AutoConfig

from verl_gradalign.data.tasks import write_task_files
from verl_gradalign.doctor import rewards
from verl_gradalign.doctor.configuration import examine_composed
from verl_gradalign.doctor.machine import Machine
from verl_gradalign.findings import Findings
from verl_gradalign.integration.compose import compose_run, composing
from verl_gradalign.toy.model import build_tiny_model

MODEL, REWARD, SAMPLER = "actor_rollout_ref.model", "reward.custom_reward_function", "trainer.v1.sampler.custom_sampler"
AGENT = "actor_rollout_ref.rollout.agent"


class Place:
    """Files, a model, and the configuration that is right."""

    def __init__(self, root):
        self.root, self._errors = root, {}
        self.files = write_task_files(root / "data", num_pool=40, num_trusted=15, num_test=5, corrupted_share=0.0)
        self.model = build_tiny_model(root / "model", hidden_size=32, num_layers=1, num_heads=2)
        overrides = [
            *("+platform=cpu", "+gradalign=cosine", "+regime=quickstart", "gradalign.validation.n=16"),
            f"gradalign.validation.files=[{self.files['trusted']}]",
            f"data.train_files=[{self.files['pool']}]",
            f"data.val_files=[{self.files['test']}]",
            f"{MODEL}.path={self.model}",
            f"trainer.default_local_dir={root / 'run'}",
        ]
        with composing():
            self.config = compose_run(overrides)
        OmegaConf.set_struct(self.config, False)

    def findings(self, overrides):
        """What the doctor finds with some keys changed."""
        config = copy.deepcopy(self.config)
        for override in overrides:
            key, _, value = override.partition("=")
            value = OmegaConf.from_dotlist([f"x={value}"]).x if not value.startswith("???") else value
            OmegaConf.update(config, key.lstrip("+"), value, force_add=True)
        findings = Findings()
        with contextlib.redirect_stdout(io.StringIO()):
            examine_composed(config, Machine(0, 0, 20), findings)
        return findings.all

    def errors(self, overrides):
        """What is wrong with some keys changed. Several remedies lead to one configuration, which is examined once."""
        key = tuple(sorted({o.partition("=")[0]: o for o in overrides}.values()))
        if key not in self._errors:
            self._errors[key] = [found for found in self.findings(overrides) if found.level == "error"]
        return self._errors[key]

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def rows(self, split):
        return pq.read_table(self.files[split]).to_pylist()

    def jsonl(self, name, rows):
        return self.write(f"{name}.jsonl", "\n".join(json.dumps(row) for row in rows))

    def parquet(self, name, rows):
        pq.write_table(pa.Table.from_pylist(rows), path := self.root / f"{name}.parquet")
        return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_PLATFORM", "cpu")
        patch.setattr(rewards, "ROWS_OF_SOURCE", 2)  # every row of these files is alike
        torch.set_num_threads(1)  # quicker for models this small
        yield Place(tmp_path_factory.mktemp("faults"))
        torch.set_num_threads(num_threads)


def test_the_configuration_that_the_faults_are_put_into_has_none(place):
    assert place.errors([]) == []
    assert {found.level for found in place.findings([])} <= {"ok", "note"}


# What is wrong, given as overrides or a function that makes them; parts of the message; what mends it, where the
# remedy is not an override that can be read from its text.
CONFIGURATION = {
    "one response": (["actor_rollout_ref.rollout.n=1", "gradalign.advantage=centred"], ["actor_rollout_ref.rollout.n=1"], None),
    "refilled groups": (["trainer.v1.sampler.sync_refill_failed_groups=true"], ["sync_refill_failed_groups=True"], []),
    "cached rollouts": (["skip.rollout_tq.enable=true"], ["skip.rollout_tq.enable=True"], []),
    "unknown score": (["gradalign.score=cosin"], ["gradalign.score", "cosin"], []),
    "unknown estimator": (["gradalign.estimator=ghst"], ["gradalign.estimator='ghst'"], None),
    "unknown schedule": (["gradalign.schedule=weekly"], ["gradalign.schedule='weekly'"], None),
    "unknown key": (["gradalign.oversampel=4"], ["gradalign.oversampel"], []),
    "a word for a number": (["gradalign.oversample=four"], ["gradalign.oversample='four'"], []),
    "too few candidates": (["gradalign.oversample=0.5"], ["gradalign.oversample=0.5"], ["gradalign.oversample=1"]),
    "too many candidates": (["gradalign.oversample=60"], ["gradalign.oversample=60", "40"], None),
    "one and a half times": (["data.train_batch_size=24", "actor_rollout_ref.actor.ppo_mini_batch_size=24"], ["draws 96 candidates"], None),
    "no trusted set": (["gradalign.validation.files=[]"], ["gradalign.validation.files=[]"], ["gradalign.score=random"]),
    "no norms": (["gradalign.estimator=finite_difference"], ["gradalign.estimator"], None),
    "fewer responses": (["gradalign.schedule=round", "gradalign.curriculum.n=4", "gradalign.curriculum.steps_per_round=2"], ["gradalign.curriculum.n=4"], ["gradalign.curriculum.n=8"]),
    "no moments": (["gradalign.direction.metric=adam", "actor_rollout_ref.actor.optim.optimizer=SGD"], ["gradalign.direction.metric=adam"], ["gradalign.direction.metric=none"]),
    "half precision": (["gradalign.score=dot", "gradalign.estimator=finite_difference", "actor_rollout_ref.actor.fsdp_config.model_dtype=bf16"], ["model_dtype=bf16"], ["gradalign.estimator=ghost"]),
    "a large batch": (["data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=64"], ["40 problems, fewer than a batch of 64"], ["data.train_batch_size=40", "actor_rollout_ref.actor.ppo_mini_batch_size=40", "gradalign.oversample=1"]),
    "rounds too large": (["gradalign.schedule=round", "gradalign.curriculum.num_candidates=500"], ["gradalign.curriculum.num_candidates=500"], ["gradalign.curriculum.num_candidates=40", "gradalign.curriculum.steps_per_round=2"]),
    "no selection": (["trainer.v1.trainer_mode=sync"], ["trainer.v1.trainer_mode=sync"], None),
    "asynchronous": (["trainer.v1.trainer_mode=colocate_async"], ["trainer.v1.trainer_mode=colocate_async"], None),
    "apart": (["trainer.v1.trainer_mode=gradalign_separate_async"], ["trainer.v1.trainer_mode=gradalign_separate_async"], ["trainer.v1.trainer_mode=gradalign"]),
    "unknown mode": (["trainer.v1.trainer_mode=gradaline"], ["trainer.v1.trainer_mode=gradaline"], ["trainer.v1.trainer_mode=gradalign"]),
    "old trainer": (["trainer.use_v1=false"], ["trainer.use_v1=False"], None),
    "no engine": (["actor_rollout_ref.rollout.name=???"], ["actor_rollout_ref.rollout.name has no value"], ["actor_rollout_ref.rollout.name=hf"]),
    "unknown engine": (["actor_rollout_ref.rollout.name=vlm"], ["actor_rollout_ref.rollout.name=vlm"], ["actor_rollout_ref.rollout.name=hf"]),
    "engine missing": (["actor_rollout_ref.rollout.name=sglang"], ["rollout.name=sglang"], ["actor_rollout_ref.rollout.name=hf"]),
    "temperature": (["actor_rollout_ref.rollout.temperature=0"], ["temperature"], ["actor_rollout_ref.rollout.temperature=1"]),
    "three ranks": (["trainer.n_gpus_per_node=3"], ["ppo_mini_batch_size=4", "3 data-parallel ranks"], None),
    "an empty batch": (["data.train_batch_size=0"], ["data.train_batch_size=0"], []),
    "no response": (["data.max_response_length=0"], ["data.max_response_length=0"], []),
    "no steps": (["trainer.total_training_steps=0"], ["trainer.total_training_steps=0"], None),
    "critic": (["algorithm.adv_estimator=gae"], ["critic.model"], ["algorithm.adv_estimator=grpo"]),
    "micro batch": (["actor_rollout_ref.actor.use_dynamic_bsz=false"], ["micro_batch_size"], ["actor_rollout_ref.actor.use_dynamic_bsz=true"]),
}  # fmt: skip
NAMED = {
    "unknown logger": (["trainer.logger=[console,wanb]"], ["trainer.logger=wanb"], None),
    "logger missing": (["trainer.logger=[swanlab]"], ["trainer.logger=swanlab", "not installed"], None),
    "sampler missing": ([f"{SAMPLER}.path=pkg://my.sampler", f"{SAMPLER}.name=Mine"], [SAMPLER, "my.sampler"], [f"{SAMPLER}.path=null"]),
    "sampler of verl": ([f"{SAMPLER}.path=pkg://verl.trainer.ppo.v1.replay_buffer", f"{SAMPLER}.name=ReplayBuffer"], [SAMPLER, "GradAlignSampler"], [f"{SAMPLER}.name=null"]),
    "sampler file missing": ([f"{SAMPLER}.path=/nowhere/mine.py", f"{SAMPLER}.name=Mine"], ["/nowhere/mine.py"], [f"{SAMPLER}.path=null"]),
    "agent loop manager": ([f"{AGENT}.agent_loop_manager_class=my.Manager"], [f"{AGENT}.agent_loop_manager_class=my.Manager"], []),
    "agent loop": ([f"{AGENT}.default_agent_loop=my_loop"], [f"{AGENT}.default_agent_loop=my_loop"], None),
    "agent loop file": ([f"{AGENT}.agent_loop_config_path=/nowhere/loops.yaml"], ["/nowhere/loops.yaml"], []),
    "agent loop class": (lambda p: [f"{AGENT}.agent_loop_config_path={p.write('loops.yaml', '- {name: mine, _target_: my.Loop}')}"], ["loops.yaml", "my.Loop"], []),
    "tools": (["actor_rollout_ref.rollout.multi_turn.tool_config_path=/nowhere/tools.yaml"], ["tool_config_path=/nowhere/tools.yaml"], []),
    "callback": (["trainer.checkpoint_callback_class=my.Callback"], ["trainer.checkpoint_callback_class=my.Callback"], []),
    "external library": ([f"{MODEL}.external_lib=no_such_module"], ["no_such_module"], []),
    "data set file": (["data.custom_cls.path=/nowhere/data.py", "data.custom_cls.name=Mine"], ["data.custom_cls=/nowhere/data.py Mine"], []),
    "data set class": (lambda p: [f"data.custom_cls.path={p.write('plain.py', 'class Mine: pass')}", "data.custom_cls.name=Mine"], ["data.custom_cls=", "Mine", "torch.utils.data.Dataset"], []),
    "data set without a frame": (lambda p: [f"data.custom_cls.path={p.write('listed.py', LISTED)}", "data.custom_cls.name=Listed"], ["data.custom_cls.name=Listed", "dataframe"], []),
    "old reward key": (["custom_reward_function.path=mine.py"], ["custom_reward_function.path=mine.py is read by nothing"], []),
}  # fmt: skip
LISTED = """
from torch.utils.data import Dataset
class Listed(Dataset):
    def __init__(self, data_files, tokenizer, config, processor=None, max_samples=-1): self.rows = [{"prompt": "1"}]
    def __len__(self): return 1
    def __getitem__(self, item): return self.rows[item]
"""


def model_folder(place, name, change=None, tokenizer=None):
    """The tiny model with another config or tokenizer."""
    folder = place.root / name
    shutil.copytree(place.model, folder, dirs_exist_ok=True)
    for file, edit in (("config.json", change), ("tokenizer_config.json", tokenizer)):
        if edit is not None:
            values = json.loads((folder / file).read_text())
            edit(values)
            (folder / file).write_text(json.dumps(values))
    return folder


def another_model(place, model_type, architecture, **options):
    folder = place.root / model_type
    shutil.copytree(place.model, folder, dirs_exist_ok=True)
    AutoConfig.for_model(model_type, architectures=[architecture], vocab_size=261, **options).save_pretrained(folder)
    return [f"{MODEL}.path={folder}"]


def without_template(place):
    folder = model_folder(place, "plain")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return [f"{MODEL}.path={folder}"]


SMALL_GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
MODELS = {
    "no model": ([f"{MODEL}.path=/nowhere"], [f"{MODEL}.path=/nowhere", "no such folder"], []),
    "no tokenizer": ([f"{MODEL}.tokenizer_path=/nowhere"], [f"{MODEL}.tokenizer_path=/nowhere"], []),
    "no chat template": (without_template, ["has no chat template"], [f"{MODEL}.custom_chat_template={TEMPLATE!r}"]),
    "adapters": ([f"{MODEL}.lora_rank=4", f"{MODEL}.target_modules=[w_query]"], [f"{MODEL}.target_modules=['w_query']"], None),
    "adapter missing": ([f"{MODEL}.lora_rank=4", f"{MODEL}.lora_adapter_path=/nowhere"], [f"{MODEL}.lora_adapter_path=/nowhere"], [f"{MODEL}.lora_adapter_path=null"]),
    "dropout": ([f"{MODEL}.override_config.attention_dropout=0.1"], ["dropout is active"], None),
    "no rule": (partial(another_model, model_type="gpt2", architecture="GPT2LMHeadModel", **SMALL_GPT), ["c_attn.weight (Conv1D)"], None),
    "not per position": (partial(another_model, model_type="gpt_bigcode", architecture="GPTBigCodeForCausalLM", **SMALL_GPT), ["transformer.wpe"], None),
    "no architecture": (lambda p: [f"{MODEL}.path={model_folder(p, 'nameless', lambda c: c.pop('architectures'))}"], ["no architectures"], []),
    "vocabulary": (lambda p: [f"{MODEL}.path={model_folder(p, 'narrow', lambda c: c.update(vocab_size=260))}"], ["vocabulary of 260 is smaller than the tokenizer's, 261"], []),
    "no config": (lambda p: [f"{MODEL}.path={p.write('empty/note.txt', '').parent}"], ["config cannot be read"], []),
}  # fmt: skip


def train(change, name="train", key="data.train_files", split="pool", as_parquet=False):
    """Overrides for files whose rows are changed."""

    def make(place):
        rows = place.rows(split)
        changed = change(rows) or rows
        folder = f"{len(list(place.root.iterdir()))}"
        (place.root / folder).mkdir()
        path = (place.parquet if as_parquet else place.jsonl)(f"{folder}/{name}", changed)
        return [f"{key}=[{path}]"]

    return make


def set_in(position, **values):
    return lambda rows: rows[position].update(values)


def dropped(column):
    return lambda rows: [row.pop(column) for row in rows] and None


def raw_text(rows):
    for row in rows:
        row["prompt"] = row["prompt"][0]["content"]


def as_text(column):
    return lambda rows: [row.update({column: json.dumps(row[column])}) for row in rows] and None


def no_truth(rows):
    for row in rows:
        row["reward_model"] = {"style": "rule"}


def null_truth_of_gsm8k(rows):
    for row in rows:
        row["reward_model"]["ground_truth"] = None


def long_prompts(num):
    return lambda rows: [row["prompt"][0].update(content="9" * 100) for row in rows[:num]] and None


def two_types(place):
    rows = place.rows("pool")
    first = place.parquet("first", rows[:20])
    for row in rows[20:]:
        row["extra_info"]["index"] = str(row["extra_info"]["index"])
    return [f"data.train_files=[{first},{place.parquet('second', rows[20:])}]"]


def empty_parquet(place):
    path = place.root / "none.parquet"
    pq.write_table(pq.read_table(place.files["pool"]).slice(0, 0), path)
    return [f"data.train_files=[{place.files['pool']},{path}]"]


FILTER = "data.filter_overlong_prompts=true"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}x{{ messages[-1]['content'] }}"
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
FILES = {
    "train file missing": (["data.train_files=[/nowhere/train.parquet]"], ["data.train_files=/nowhere/train.parquet", "no such file"], []),
    "train file of another kind": (lambda p: [f"data.train_files=[{p.write('train.csv', 'prompt')}]"], ["train.csv: neither parquet"], []),
    "no train file": (["data.train_files=[]"], ["data.train_files=[]"], []),
    "broken parquet": (lambda p: [f"data.train_files=[{p.write('broken.parquet', 'x')}]"], ["broken.parquet: cannot be read"], []),
    "empty json": (lambda p: [f"data.train_files=[{p.write('nothing.jsonl', '')}]"], ["nothing.jsonl: no rows"], []),
    "agent of rows": (train(lambda rows: [row.update(agent_name="mine") for row in rows] and None), ["agent_name 'mine'"], []),
    "pictures": (train(set_in(4, images=["a.png"])), ["row 5: images is not empty"], []),
    "empty parquet": (empty_parquet, ["none.parquet: no rows"], []),
    "no prompt column": (train(dropped("prompt")), ["no column 'prompt'"], []),
    "another prompt key": (["data.prompt_key=question"], ["'question' (data.prompt_key)"], ["data.prompt_key=prompt"]),
    "prompt null": (train(set_in(5, prompt=None)), ["train.jsonl, row 6: prompt is null"], []),
    "prompt empty": (train(set_in(2, prompt=[])), ["train.jsonl, row 3: prompt has no message"], []),
    "prompt without content": (train(set_in(0, prompt=[{"role": "user", "content": None}])), ["row 1: prompt has a message without role or content"], []),
    "prompt as text": (train(raw_text), ["prompt is string", "list of messages"], []),
    "no reward_model": (train(dropped("reward_model")), ["no column reward_model"], []),
    "reward_model null": (train(set_in(7, reward_model=None)), ["row 8: reward_model is null"], []),
    "reward_model as text": (train(as_text("reward_model")), ["reward_model is string"], []),
    "no ground truth": (train(no_truth), ["reward_model.ground_truth"], []),
    "no data source": (train(dropped("data_source")), ["no column data_source"], []),
    "two types": (two_types, ["extra_info.index", "first.parquet", "second.parquet"], []),
    "extra_info as text": (train(as_text("extra_info")), ["extra_info is string"], []),
    "own column": (train(lambda rows: [row.update(gradalign_problem_id=1) for row in rows] and None), ["gradalign_problem_id"], []),
    "unknown label": (["gradalign.log.columns=[topic]"], ["gradalign.log.columns=['topic']"], ["gradalign.log.columns=[family]"]),
    "trusted file missing": (["gradalign.validation.files=[/nowhere/t.parquet]"], ["gradalign.validation.files=/nowhere/t.parquet"], []),
    "trusted problems trained on": (lambda p: [f"gradalign.validation.files=[{p.files['pool']}]"], ["also stand in data.train_files"], []),
    "trusted prompt null": (train(set_in(3, prompt=None), "trusted", "gradalign.validation.files", "trusted"), ["gradalign.validation.files=", "row 4: prompt is null"], []),
    "val file missing": (["data.val_files=[/nowhere/test.parquet]"], ["data.val_files=/nowhere/test.parquet"], []),
    "no val file": (["data.val_files=null"], ["data.val_files=None"], []),
    "val without reward_model": (train(dropped("reward_model"), "val", "data.val_files", "test"), ["data.val_files: no column reward_model"], []),
    "prompts too long": (["data.max_prompt_length=8"], ["longer than data.max_prompt_length=8"], None),
    "few left": (lambda p: [*train(long_prompts(30), "long")(p), FILTER], ["draws 16 candidates", "hold 10"], None),
    "none left": (lambda p: [*train(long_prompts(40), "longest")(p), FILTER], ["0 problems are left"], None),
    "system turn": (lambda p: [*train(set_in(0, prompt=SYSTEM))(p), f"{MODEL}.custom_chat_template={REFUSING!r}"], ["row 1: the chat template refuses the prompt", "no system turn"], [f"{MODEL}.custom_chat_template={TEMPLATE!r}"]),
}  # fmt: skip
CHECKPOINTS = {
    "folder that cannot be written": (["trainer.default_local_dir=/proc/run"], ["trainer.default_local_dir=/proc/run"], []),
    "log that cannot be written": (["gradalign.log.dir=/proc/log"], ["gradalign.log.dir=/proc/log"], []),
    "checkpoint missing": (["trainer.resume_mode=resume_path", "trainer.resume_from_path=/nowhere/global_step_99"], ["trainer.resume_from_path=/nowhere/global_step_99"], ["trainer.resume_mode=disable"]),
    "checkpoint unnamed": (["trainer.resume_mode=resume_path"], ["trainer.resume_from_path=None"], ["trainer.resume_mode=disable"]),
    "checkpoint without number": (["trainer.resume_mode=resume_path", "trainer.resume_from_path=/tmp"], ["trainer.resume_from_path=/tmp"], ["trainer.resume_mode=disable"]),
    "unknown resume mode": (["trainer.resume_mode=yes_please"], ["trainer.resume_mode=yes_please"], ["trainer.resume_mode=disable"]),
    "tracker file": (lambda p: [f"trainer.default_local_dir={p.write('tracked/latest_checkpointed_iteration.txt', 'last').parent}"], ["latest_checkpointed_iteration.txt holds 'last'"], ["trainer.resume_mode=disable"]),
    "checkpoint of two ranks": (lambda p: two_ranks(p), ["was written by 2 ranks"], ["trainer.resume_mode=disable"]),
    "checkpoint without weights": (lambda p: two_ranks(p, "hollow", is_whole=False), ["has no folder actor"], ["trainer.resume_mode=disable"]),
}  # fmt: skip


def two_ranks(place, name="ranks", is_whole=True):
    folder = place.root / name / "global_step_3"
    (folder / "actor").mkdir(parents=True, exist_ok=True)
    if is_whole:
        (folder / "actor" / "model_world_size_2_rank_0.pt").touch()
    else:
        (folder / "actor").rmdir()
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("3")
    return [f"trainer.default_local_dir={folder.parent}"]


def graded(body, head="", before="", name="compute_score"):
    """Overrides for a reward function with this body."""

    def make(place):
        text = (
            f"{before}\n{head or 'def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):'}\n"
        )
        text += "".join(f"    {line}\n" for line in body.splitlines())
        path = place.write(f"rewards/{abs(hash((body, head, before)))}.py", text)
        return [f"{REWARD}.path={path}", f"{REWARD}.name={name}"]

    return make


RIGHT = "return float(solution_str.strip('=~') == ground_truth)"
NO_ERROR_LEFT = [f"{REWARD}.path=pkg://verl_gradalign.data.rewards", f"{REWARD}.name=compute_score"]
REWARDS = {
    "always nan": (graded("return float('nan')"), ["rewards tried are not finite"], NO_ERROR_LEFT),
    "always infinite": (graded("return float('inf')"), ["rewards tried are not finite"], NO_ERROR_LEFT),
    "nothing": (graded("pass"), ["returns nothing (None)"], NO_ERROR_LEFT),
    "a pair": (graded("return 1.0, 'ok'"), ["(1.0, 'ok') of type tuple"], NO_ERROR_LEFT),
    "a text": (graded("return '1.0'"), ["'1.0' of type str"], NO_ERROR_LEFT),
    "a list": (graded("return [1.0]"), ["of type list"], NO_ERROR_LEFT),
    "an array": (graded("return np.ones(2)", before="import numpy as np"), ["of type ndarray"], NO_ERROR_LEFT),
    "a complex number": (graded("return 1j"), ["of type complex"], NO_ERROR_LEFT),
    "no score": (graded("return {'reward': 1.0}"), ["without 'score'"], NO_ERROR_LEFT),
    "score is a text": (graded("return {'score': 'yes'}"), ["'yes' of type str"], NO_ERROR_LEFT),
    "score is nothing": (graded("return {'score': None}"), ["returns nothing (None)"], NO_ERROR_LEFT),
    "parts in the result": (graded("return {'score': 1.0, 'parts': {'a': 1}}"), ["'parts'", "of type dict"], NO_ERROR_LEFT),
    "cannot be sent": (graded("import threading\nreturn {'score': 1.0, 'lock': threading.Lock()}"), ["sent to another process"], NO_ERROR_LEFT),
    "raises": (graded("raise ValueError('broken')"), ["ValueError: broken"], NO_ERROR_LEFT),
    "raises for a wrong answer": (graded(f"if 'know' in solution_str: raise ValueError('?')\n{RIGHT}"), ["the reward of the wrong answer fails"], NO_ERROR_LEFT),
    "raises for an empty answer": (graded(f"solution_str[0]\n{RIGHT}"), ["the reward of the empty answer fails"], NO_ERROR_LEFT),
    "ends the program": (graded("raise SystemExit(3)"), ["SystemExit"], NO_ERROR_LEFT),
    "other arguments": (graded(RIGHT, "def compute_score(prompt, response):"), ["unexpected keyword argument"], NO_ERROR_LEFT),
    "too few arguments": (graded("return 1.0", "def compute_score(solution_str, ground_truth):"), ["unexpected keyword argument 'data_source'"], NO_ERROR_LEFT),
    "a signal": (graded(f"import signal\nsignal.signal(signal.SIGALRM, print)\n{RIGHT}"), ["main thread"], NO_ERROR_LEFT),
    "a coroutine": (graded("return later()", before="async def later():\n    return 1.0"), ["of type coroutine"], NO_ERROR_LEFT),
    "no function": ([f"{REWARD}.path=/nowhere/reward.py"], [f"{REWARD}: path=/nowhere/reward.py"], NO_ERROR_LEFT),
    "no such name": ([f"{REWARD}.name=grade"], [REWARD, "grade"], NO_ERROR_LEFT),
    "an import that fails": (graded(RIGHT, before="import no_such_library"), ["no_such_library"], NO_ERROR_LEFT),
    "a constant": (graded(RIGHT, before="LEVEL = 3", name="LEVEL"), ["not callable"], NO_ERROR_LEFT),
    "no function of verl": ([f"{REWARD}.path=null"], ["no reward function for data source gradalign/tasks"], NO_ERROR_LEFT),
    "unknown manager": (["reward.reward_manager.name=naiv"], ["reward.reward_manager: name=naiv"], ["reward.reward_manager.name=naive"]),
    "manager without a file": (["reward.reward_manager.source=importlib"], ["reward.reward_manager"], ["reward.reward_manager.source=register"]),
    "metric that is not returned": (["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=accuracy"], ["algorithm.filter_groups.metric=accuracy"], None),
}  # fmt: skip
FORECAST = [
    "gradalign.schedule=forecast",
    "gradalign.measure=update",
    "gradalign.score=dot",
    "gradalign.estimator=low_rank",
]
FORECASTS = {
    "update without forecast": (["gradalign.measure=update"], ["gradalign.measure='update'", "needs schedule forecast"], None),
    "norms of the update": ([*FORECAST, "gradalign.score=cosine"], ["gradalign.score='cosine'", "gradient norms"], None),
    "update of rewards": ([*FORECAST, "gradalign.score=accuracy_band"], ["gradalign.measure='update'", "rewards alone"], None),
    "estimator of the update": ([*FORECAST, "gradalign.estimator=backward"], ["gradalign.estimator='backward'"], None),
    "forecast of nothing": ([*FORECAST, "gradalign.score=random"], ["gradalign.score='random'", "nothing to forecast"], None),
    "forecast of candidates": ([*FORECAST, "gradalign.score=learnalign"], ["gradalign.score='learnalign'", "another step"], None),
    "metric of candidates": ([*FORECAST, "gradalign.direction.metric=candidates"], ["gradalign.direction.metric='candidates'"], None),
    "no way back": ([*FORECAST, "gradalign.reliability.min_reliability=0.1"], ["gradalign.reliability.min_reliability=0.1"], ["gradalign.reliability.min_reliability=null"]),
    "drawn together twice": ([*FORECAST, "gradalign.reliability.shrinkage=0.5"], ["gradalign.reliability.shrinkage=0.5"], None),
    "trained on without forecast": (["gradalign.direction.train_on_trusted=true"], ["gradalign.direction.train_on_trusted=True"], None),
    "groups of two sizes": ([*FORECAST, "gradalign.direction.train_on_trusted=true"], ["gradalign.validation.n=16", "groups of a batch have one size, 8"], None),
    "no room for others": ([*FORECAST, "gradalign.direction.train_on_trusted=true", "gradalign.validation.n=8", "gradalign.direction.refresh_interval=1"], ["gradalign.direction.refresh_interval=1", "the batch is of 4"], ["gradalign.direction.refresh_interval=5"]),
    "unknown feature": ([*FORECAST, "gradalign.forecast.features=[colour]"], ["gradalign.forecast.features=['colour']"], ["gradalign.forecast.features=[source]"]),
    "no feature function": ([*FORECAST, "gradalign.forecast.features=[/nowhere/mine.py:level]"], ["gradalign.forecast.features='/nowhere/mine.py:level'"], ["gradalign.forecast.features=[text]"]),
    "feature that is none": (lambda p: [*FORECAST, f"gradalign.forecast.features=[{p.write('levels.py', 'LEVEL = 3')}:LEVEL]"], ["levels.py:LEVEL", "no function"], ["gradalign.forecast.features=[text]"]),
    "feature without a key": (lambda p: [*FORECAST, f"gradalign.forecast.features=[{p.write('raising.py', 'level = lambda row: row[1]')}:level]"], ["raising.py:level", "raised KeyError"], ["gradalign.forecast.features=[text]"]),
    "feature in words": (lambda p: [*FORECAST, f"gradalign.forecast.features=[{p.write('words.py', 'level = lambda row: chr(97)')}:level]"], ["words.py:level", "of problem 0"], ["gradalign.forecast.features=[text]"]),
    "small forecast pool": ([*FORECAST, "data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=64"], ["40 problems, fewer than a batch of 64"], ["data.train_batch_size=40", "actor_rollout_ref.actor.ppo_mini_batch_size=40"]),
}  # fmt: skip
FAULTS = CONFIGURATION | NAMED | MODELS | FILES | CHECKPOINTS | REWARDS | FORECASTS


def mended(overrides, remedy):
    """The overrides with the first `key=value` of the remedy's text."""
    key, value = re.search(
        r"(?:set |or )?\+?([a-z_0-9]+(?:\.[a-zA-Z_0-9]+)+)=('[^']*'|\S+?)(?=[,;.)]?(?:\s|$))", remedy
    ).groups()
    return [*overrides, f"{key}={value.strip(chr(39))}"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_its_remedy_leaves_none(place, name):
    fault, parts, fix = FAULTS[name]
    overrides = fault(place) if callable(fault) else fault
    found = place.errors(overrides)
    named = [f for f in found if all(part in f.message for part in parts)]
    assert named, found
    assert all(f.remedy for f in found), found
    assert len(found) <= 3, found
    right = mended(overrides, named[0].remedy) if fix is None else [*overrides, *fix] if fix else []
    assert place.errors(right) == [], right


def test_there_are_faults_of_every_kind():
    assert len(FAULTS) >= 100


def warnings_of(place, overrides):
    found = place.findings(overrides)
    assert not [f for f in found if f.level == "error"], found
    return " | ".join(f.message for f in found if f.level == "warning")


def test_a_forecast_is_a_right_configuration_whose_cost_and_features_are_said(place):
    found = place.findings(FORECAST)
    assert {f.level for f in found} <= {"ok", "note"}, found
    said = " | ".join(f.message for f in found)
    # 4 problems x 8 responses, and a tenth of 15 x 16 trusted ones.
    assert "generates 56 responses, 1.75 times those trained on" in said
    assert "`prompt` asks the policy" in said and "reading prompts for" in said and "16 are forecast in a step" in said
    assert "measured in the update with estimator low_rank" in said
    without = place.findings([*FORECAST, "gradalign.forecast.features=[source]"])
    text = " | ".join(f.message for f in without)
    assert "asks the policy" not in text and "reading prompts" not in text


def test_a_shortlist_of_the_whole_pool_and_filtered_groups_are_warnings(place):
    assert "most of the 40 problems" in warnings_of(place, [*FORECAST, "gradalign.oversample=8"])
    filters = ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward"]
    assert "never reach the forecast" in warnings_of(place, [*FORECAST, *filters])


def test_a_grader_that_does_not_return_is_given_up_once(place, monkeypatch):
    monkeypatch.setattr(rewards, "MAX_CALL_S", 0.5)
    began = time.monotonic()
    found = warnings_of(place, graded("import time\ntime.sleep(60)")(place))
    assert "takes more than" in found and time.monotonic() - began < 20


def test_a_grader_that_rejects_right_answers_is_a_warning(place):
    assert "the own truth" in warnings_of(place, graded("return 0.0")(place))
    # One that asks for a form of its own is none.
    assert warnings_of(place, graded("return {'score': solution_str == f'#### {ground_truth}'}")(place)) == ""


def test_a_grader_that_accepts_anything_is_a_warning(place):
    assert "'I do not know' scores above" in warnings_of(place, graded("return float(bool(solution_str))")(place))


def test_rewards_that_are_nan_now_and_then_are_a_warning(place):
    found = warnings_of(place, graded(f"if not solution_str: return float('nan')\n{RIGHT}")(place))
    assert "nan for the empty answer" in found and "Such groups are never kept" in found


def test_other_keys_for_other_answers_are_a_warning(place):
    assert "returns other keys" in warnings_of(
        place,
        graded("right = float(solution_str == ground_truth)\nreturn {'score': right, 'right': 1} if right else right")(
            place
        ),
    )


def test_a_function_that_changes_what_it_is_given_changes_its_own_copy(place):
    body = "assert extra_info['family']\nextra_info.clear()\nreturn float(solution_str == ground_truth)"
    assert warnings_of(place, graded(body)(place)) == ""


@pytest.mark.parametrize(
    "returned", ["1.0", "True", "1", "np.float64(1)", "torch.tensor(1.0)", "{'score': 1.0, 'pred': 'a', 'acc': None}"]
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_rewards_that_verl_can_use_are_no_fault(place, returned, kind):
    head = f"{kind} compute_score(data_source, solution_str, ground_truth, extra_info=None):"
    body = f"return {returned} if solution_str.strip() == ground_truth else 0.0"
    assert place.errors(graded(body, head, before="import numpy as np, torch")(place)) == []
