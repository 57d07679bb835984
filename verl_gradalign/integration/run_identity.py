# SPDX-License-Identifier: Apache-2.0
"""Where a run's selection lies beside verl's checkpoint, and what it belongs to.

`global_step_<n>/actor/gradalign.npz` holds the state; each rank keeps its shards of the direction in the same folder,
beside its weights (`probe.direction_file`). Both are written before verl writes `latest_checkpointed_iteration.txt`,
which makes the checkpoint the one to resume from.
"""

import importlib.metadata
import logging
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.config_fields import decisive
from verl_gradalign.errors import refuse
from verl_gradalign.files import file_fingerprint
from verl_gradalign.selection.state_file import read_identity, require_same
from verl_gradalign.versions import installed_versions

logger = logging.getLogger(__name__)

STATE = "gradalign.npz"
DECISIVE_OF_VERL = (
    "data.train_batch_size",
    "data.train_max_samples",
    "data.prompt_key",
    "data.max_prompt_length",
    "data.filter_overlong_prompts",
    "algorithm.adv_estimator",
    "algorithm.norm_adv_by_std_in_grpo",
    "algorithm.filter_groups.enable",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.actor.loss_agg_mode",
)
DECISIVE_PACKAGES = ("verl", "verl-gradalign", "numpy")


def state_file(folder: Path) -> Path:
    """Return where a checkpoint's selection state is written: in the actor's folder, which verl removes in its time."""
    return folder / "actor" / STATE


def saved_state_file(folder: Path) -> Path:
    """Return where a checkpoint's selection state lies, if it has one; earlier versions wrote it one level higher."""
    earlier = folder / STATE
    return earlier if earlier.exists() and not state_file(folder).exists() else state_file(folder)


def direction_folder(folder: Path) -> Path:
    """Return where each rank keeps its part of a checkpoint's direction: the actor's folder, on the rank's machine.

    verl removes it when it is outdated.
    """
    return folder / "actor"


def trusted_rows_file(folder: Path) -> Path:
    """Return where the kept trusted responses lie in a checkpoint: in the actor's folder, on the driver's machine.

    verl removes it when it is outdated.
    """
    return folder / "actor" / "gradalign_trusted.pt"


def identity(config: GradAlignConfig, verl_config: DictConfig) -> dict[str, Any]:
    """Return what must be the same for a resumed run to select what the unbroken one does.

    The number of ranks, micro-batches, paths and how often something is polled are not among it.
    """
    own = {**decisive(config), "validation": {"n": config.validation.n, **trusted_identity(config)}}
    train = verl_config.data.train_files
    return {
        "gradalign": own,
        "verl": {key: OmegaConf.select(verl_config, key) for key in DECISIVE_OF_VERL},
        "data.train_files": fingerprints([train] if isinstance(train, str) else train),
        "versions": {package: importlib.metadata.version(package) for package in DECISIVE_PACKAGES},
    }


def resume_folder(verl_config: DictConfig) -> Path | None:
    """Return the checkpoint that verl will resume from, None if it starts from scratch."""
    trainer = verl_config.trainer
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path":
        return Path(trainer.resume_from_path).absolute()
    latest = find_latest_ckpt_path(str(Path(trainer.default_local_dir).absolute()))
    return None if latest is None else Path(latest)


def check_identity(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Refuse to resume a selection that belongs to something else than this run; see `check_resume`."""
    check_resume(identity(config, verl_config), verl_config)


def check_resume(current: dict[str, Any], verl_config: DictConfig) -> None:
    """Refuse, before any worker starts, to resume a selection that belongs to something else.

    Raises: ValueError that names what differs, or says that the file is damaged.
    """
    folder = resume_folder(verl_config)
    if folder is None:
        return
    if not folder.is_dir():
        refuse("trainer.resume_from_path", folder, "no such folder", "give the global_step_<n> folder of a checkpoint")
    path = saved_state_file(folder)
    if path.exists():
        require_same(path, read_identity(path), current)
    else:
        logger.warning(
            "%s has no selection state (%s): it was saved without this plugin. Weights and optimizer are resumed, the "
            "selection starts afresh",
            folder,
            path.name,
        )


def trusted_identity(config: GradAlignConfig) -> dict[str, Any]:
    """Return what the direction depends on, by trusted set."""
    sets = config.validation.trusted_sets()
    return {s.name: {"weight": s.weight, "n": s.n, "files": fingerprints(s.files)} for s in sets}


def fingerprints(files: Iterable[Any]) -> list[str]:
    """Return a hash of each file's content, or its address where it is not on this machine."""
    paths = [(str(name), Path(str(name)).expanduser()) for name in files]
    return [file_fingerprint(path) if path.is_file() else name for name, path in paths]


def about_run(verl_config: DictConfig) -> dict[str, Any]:
    """Return the versions, verl's whole configuration, resolved, and the time."""
    return {
        "versions": installed_versions(),
        "config": OmegaConf.to_container(verl_config, resolve=True),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
