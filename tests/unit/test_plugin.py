# SPDX-License-Identifier: Apache-2.0
"""What `import verl` does with the plugin, in processes of its own: hooks, Hydra groups, trainer and CPU platform."""

import copy
import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

from verl_gradalign.config import GradAlignConfig, ValidationConfig
from verl_gradalign.plugin import check_verl_version

PRINT_MARK = "ANSWER:"


def run_python(code, check=True, **env):
    """Run `code` in a new interpreter with only the given VERL_* variables; return the completed process."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VERL_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=check,
    )


def answer_of(code, **env):
    """Run `code`, which calls answer(value) once, and return that value."""
    prelude = f"import json\ndef answer(value): print({PRINT_MARK!r} + json.dumps(value))\n"
    process = run_python(prelude + textwrap.dedent(code), check=False, **env)
    lines = [line for line in process.stdout.splitlines() if line.startswith(PRINT_MARK)]
    assert process.returncode == 0 and len(lines) == 1, process.stderr
    assert "verl-gradalign could not be loaded" not in process.stderr, process.stderr
    return json.loads(lines[0].removeprefix(PRINT_MARK))


INSPECT = """
import sys
import verl
from verl.plugin.platform import PlatformRegistry
found = {
    "plugin": "verl_gradalign.plugin" in sys.modules,
    "modules": sorted(name for name in sys.modules if name.split(".")[0] in ("hydra", "verl", "verl_gradalign")),
    "platforms": sorted(PlatformRegistry.registered_names()),
}
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

def composed(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=False)

found["stock"] = composed()
"""

WITH_PLUGIN = (
    INSPECT
    + """
found["cosine"] = composed("+gradalign=cosine", "gradalign.validation.files=x.parquet")
found["quickstart"] = composed("+platform=cpu", "+regime=quickstart", "+gradalign=random")
found["cpu_vllm"] = composed("+platform=cpu_vllm", "+regime=quickstart", "+gradalign=random")
import verl.trainer.ppo.v1
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
trainer = get_trainer_cls("gradalign")
found["trainer"] = f"{trainer.__module__}.{trainer.__qualname__}"
found["stock_trainer"] = get_trainer_cls("sync").__module__
answer(found)
"""
)


@pytest.fixture(scope="module")
def with_plugin():
    return answer_of(WITH_PLUGIN)


@pytest.fixture(scope="module")
def without_plugin():
    return answer_of(INSPECT + "answer(found)", VERL_USE_EXTERNAL_PLUGINS="none")


def test_import_verl_loads_the_plugin_through_its_entry_point(with_plugin, without_plugin):
    assert with_plugin["plugin"]
    assert not without_plugin["plugin"]


def test_the_plugin_adds_no_imports_but_its_own(with_plugin, without_plugin):
    added = set(with_plugin["modules"]) - set(without_plugin["modules"])
    assert added == {"verl_gradalign", "verl_gradalign.plugin"}
    assert not any(name.startswith(("hydra", "verl.trainer")) for name in with_plugin["modules"])


def test_without_the_variable_the_cpu_platform_is_unknown(with_plugin, without_plugin):
    assert "cpu" not in with_plugin["platforms"]
    assert with_plugin["platforms"] == without_plugin["platforms"]


def test_without_the_word_the_composed_configuration_is_verls_own(with_plugin, without_plugin):
    assert with_plugin["stock"] == without_plugin["stock"]


def test_the_word_sets_the_trainer_the_sampler_the_storage_and_the_block_and_nothing_else(with_plugin):
    config, stock = copy.deepcopy(with_plugin["cosine"]), with_plugin["stock"]
    assert config["gradalign"]["score"] == "cosine"
    assert config["gradalign"]["validation"] == {"files": "x.parquet", "n": None, "sets": []}
    v1 = config["trainer"]["v1"]
    assert v1["trainer_mode"] == "gradalign"
    assert v1["sampler"]["custom_sampler"] == {
        "path": "pkg://verl_gradalign.integration.sampler",
        "name": "GradAlignSampler",
    }
    storage, stock_storage = (each["transfer_queue"]["backend"]["SimpleStorage"] for each in (config, stock))
    assert storage["total_storage_size"] is None and stock_storage["total_storage_size"] is not None
    del config["gradalign"]
    storage["total_storage_size"] = stock_storage["total_storage_size"]
    v1["trainer_mode"] = stock["trainer"]["v1"]["trainer_mode"]
    v1["sampler"]["custom_sampler"] = stock["trainer"]["v1"]["sampler"]["custom_sampler"]
    assert config == stock


def test_platform_and_regime_compose_with_the_word(with_plugin):
    config = with_plugin["quickstart"]
    assert config["gradalign"]["score"] == "random"
    assert config["trainer"]["device"] == "cpu"
    assert config["trainer"]["experiment_name"] == "quickstart"
    assert config["actor_rollout_ref"]["rollout"]["name"] == "hf"
    assert config["reward"]["custom_reward_function"]["path"] == "pkg://verl_gradalign.data.rewards"


def test_vllm_on_a_cpu_differs_from_the_cpu_platform_in_the_rollout_alone(with_plugin):
    config, plain = copy.deepcopy(with_plugin["cpu_vllm"]), copy.deepcopy(with_plugin["quickstart"])
    rollout, of_the_platform = (c["actor_rollout_ref"].pop("rollout") for c in (config, plain))
    assert config == plain
    assert rollout["name"] == "vllm" and rollout["enable_sleep_mode"] is False
    for key in ("dtype", "enforce_eager", "free_cache_engine", "load_format", "n", "tensor_model_parallel_size"):
        assert rollout[key] == of_the_platform[key]


def test_verl_knows_the_trainer_and_keeps_its_own(with_plugin):
    assert with_plugin["trainer"] == "verl_gradalign.integration.trainer.GradAlignTrainer"
    assert with_plugin["stock_trainer"] == "verl.trainer.ppo.v1.trainer_sync"


def test_the_dataclasses_accept_what_hydra_composes(with_plugin):
    config = GradAlignConfig.from_mapping(with_plugin["cosine"]["gradalign"])
    assert config == GradAlignConfig(validation=ValidationConfig(files=("x.parquet",)))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


ON_CPU = """
import inspect
import sys
import verl
from verl.plugin.platform import PlatformRegistry, get_platform
found = {"heavy": [name for name in ("hydra", "verl.trainer") if name in sys.modules]}
found["platforms"] = sorted(PlatformRegistry.registered_names())
found["device"] = get_platform().device_name
import torch
import verl.utils.distributed as distributed
found["signature"] = {
    name: repr(parameter.default)
    for name, parameter in inspect.signature(distributed.initialize_global_process_group_ray).parameters.items()
}
distributed.initialize_global_process_group_ray()
found["backend"] = torch.distributed.get_backend()
total = torch.ones(2)
torch.distributed.all_reduce(total)
found["sum"] = total.tolist()
import verl.utils.fsdp_utils as fsdp_utils
from torch.distributed.device_mesh import init_device_mesh
module = torch.nn.Linear(2, 2)
torch.distributed.fsdp.fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
live = module.weight.to_local().data_ptr()
found["saved_is_live"] = {}
for name, save in {"ours": fsdp_utils.fsdp2_sharded_save_to_cpu, "verl": None}.items():
    state, _ = (save or fsdp_utils.fsdp2_sharded_save_to_cpu.__wrapped__)(module)
    found["saved_is_live"][name] = state["weight"][0].data_ptr() == live
torch.distributed.destroy_process_group()
import verl.workers.engine
from verl.workers.engine.base import EngineRegistry
found["engine"] = EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__
import verl.workers.rollout.replica, verl.workers.rollout.base
from verl.workers.rollout.replica import get_rollout_replica_class
found["replica"] = get_rollout_replica_class("hf").__name__
from verl.checkpoint_engine import CheckpointEngineRegistry
found["checkpoint_engine"] = CheckpointEngineRegistry.get("gloo").__name__
found["rollout"] = verl.workers.rollout.base.get_rollout_class("hf", "async").__name__
answer(found)
"""


@pytest.fixture(scope="module")
def on_cpu():
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return answer_of(ON_CPU, VERL_PLATFORM="cpu", **group)


def test_the_variable_registers_the_cpu_platform_and_imports_no_trainer(on_cpu):
    assert "cpu" in on_cpu["platforms"] and on_cpu["device"] == "cpu"
    assert on_cpu["heavy"] == []


def test_verls_process_group_still_takes_a_backend_that_nobody_sets(on_cpu):
    # verl_gradalign.cpu.registration sets this argument; if verl changes it, the shim has to change with it.
    assert on_cpu["signature"]["backend"] == "None"


def test_the_process_group_of_the_cpu_platform_is_plain_gloo(on_cpu):
    assert on_cpu["backend"] == "gloo"
    assert on_cpu["sum"] == [1.0, 1.0]


def test_the_cpu_platform_has_engines_and_the_hf_rollout(on_cpu):
    assert on_cpu["engine"] == "CpuFSDPEngineWithLMHead"
    assert on_cpu["replica"] == "HFReplica"
    assert on_cpu["rollout"] == "HFRollout"
    assert on_cpu["checkpoint_engine"] == "GlooCheckpointEngine"


def test_weights_laid_aside_are_copies_which_verls_own_are_not(on_cpu):
    # If verl's own are copies too, the shim `_copy_saved_weights` can go.
    assert on_cpu["saved_is_live"] == {"ours": False, "verl": True}


IMPORT_VLLM = """
import sys
import verl
sys.path.insert(0, {folder!r})
import vllm._custom_ops as ops
answer(vars(ops).get("_supports_onednn"))
"""


def stand_in_for_vllm(folder, source):
    """Write a package vllm whose `_custom_ops` holds `source`, and return code that imports it after verl."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").touch()
    (folder / "vllm" / "_custom_ops.py").write_text(source)
    return IMPORT_VLLM.format(folder=str(folder))


def test_vllm_is_told_that_there_is_no_onednn_on_the_cpu_platform_only(tmp_path):
    code = stand_in_for_vllm(tmp_path, "_supports_onednn = True")
    assert answer_of(code, VERL_PLATFORM="cpu") is False
    assert answer_of(code) is True


def test_a_vllm_without_the_switch_is_reported(tmp_path):
    code = stand_in_for_vllm(tmp_path, "")
    process = run_python("answer = print\n" + code, VERL_PLATFORM="cpu")
    assert "verl-gradalign could not be loaded (weight pushes into vLLM)" in process.stderr
    assert "_supports_onednn is gone" in process.stderr and "rollout.name=hf" in process.stderr


@pytest.mark.parametrize("version", ["0.9.1", "0.9.5", "0.9.1.post1", "0.9.2.dev0", "0.9.1+cu12"])
def test_supported_versions_of_verl_are_accepted(version):
    check_verl_version(version)


@pytest.mark.parametrize("version", ["0.9.0", "0.8.9", "0.10.0", "0.10.0.dev0", "1.0", "0.9"])
def test_other_versions_of_verl_are_refused(version):
    with pytest.raises(ImportError, match=f"verl {version} is installed, but this plugin needs verl >= 0.9.1, < 0.10"):
        check_verl_version(version)


def test_a_plugin_that_cannot_load_says_so_and_leaves_verl_usable():
    process = run_python("import sys; sys.modules['wrapt'] = None; import verl; print(verl.__version__)")
    report = process.stderr
    assert "ERROR" in report and "verl-gradalign could not be loaded" in report and "wrapt" in report
    assert "Remedy:" in report and "VERL_USE_EXTERNAL_PLUGINS=none" in report
    assert process.stdout.strip()


def test_a_hook_that_fails_is_reported_and_breaks_nothing_of_verls():
    code = """
    import verl
    import verl_gradalign.plugin
    verl_gradalign.plugin.search_path_plugin = None
    import hydra.core.plugins
    print("hydra is there")
    """
    process = run_python(code)
    assert "hydra is there" in process.stdout
    assert "verl-gradalign could not be loaded (Hydra search path)" in process.stderr and "Remedy" in process.stderr


def test_the_search_path_is_appended_behind_verls_own():
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

    from verl_gradalign.plugin import search_path_plugin

    path = ConfigSearchPathImpl()
    path.append("verl", "pkg://verl.trainer.config")
    search_path_plugin()().manipulate_search_path(path)
    assert [entry.path for entry in path.get_path()] == ["pkg://verl.trainer.config", "pkg://verl_gradalign.configs"]


def test_the_check_that_keeps_fsdp1_off_the_cpu_is_still_where_the_shim_expects_it():
    import torch
    from torch.distributed.fsdp import _init_utils

    # verl_gradalign/cpu/engines.py steps around it; that module imports verl's engines, hence the name spelled out.
    check = _init_utils._check_module_states_for_sync_module_states
    with pytest.raises(ValueError, match="sync_module_states"):
        check([torch.zeros(1)])


def test_verl_still_asks_for_flash_attention_where_the_shim_expects_it(monkeypatch):
    """A critic on the CPU is built with torch's own attention, whatever verl names."""
    from transformers import AutoModelForTokenClassification
    from verl.utils.model import load_valuehead_model

    from verl_gradalign.cpu.engines import critics_need_no_flash_attention

    asked = []
    monkeypatch.setattr(AutoModelForTokenClassification, "from_pretrained", lambda **call: asked.append(call) or call)
    original = AutoModelForTokenClassification.from_pretrained
    load_valuehead_model("folder", None, None, False)
    with critics_need_no_flash_attention():
        load_valuehead_model("folder", None, None, False)
    assert [call["attn_implementation"] for call in asked] == ["flash_attention_2", "sdpa"]
    assert AutoModelForTokenClassification.from_pretrained is original


def test_verls_old_trainer_is_refused_where_selection_is_asked_for(tmp_path):
    """It would train without selection, and say nothing. Refused before Ray starts."""
    words = ["+platform=cpu", "+regime=quickstart", "+gradalign=random", "trainer.use_v1=False"]
    files = ["data.train_files=train", "data.val_files=test", "actor_rollout_ref.model.path=model"]
    process = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *words, *files, f"hydra.run.dir={tmp_path}"],
        env=os.environ | {"VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode != 0 and "Started a local Ray instance" not in process.stderr
    assert "trainer.use_v1=False: verl's old trainer knows no samplers" in process.stderr
