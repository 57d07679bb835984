# SPDX-License-Identifier: Apache-2.0
"""The train files, the trusted sets and verl's own validation: how many, how long, how noisy, how rewarded."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.reward import get_custom_reward_fn

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.doctor.files import (
    Frame,
    examine_columns,
    examine_repeats,
    frame_of_own_class,
    has_own_class,
    read_frame,
)
from verl_gradalign.doctor.prompts import MAX_READ, Prompts, examine_prompts
from verl_gradalign.doctor.rewards import AREA, FUNCTION, TIME, Graded, RewardTrial, grade, report
from verl_gradalign.findings import Findings
from verl_gradalign.integration.features import TRIED
from verl_gradalign.integration.prompt_states import prompt_tokens
from verl_gradalign.selection.own_features import OwnFeatures
from verl_gradalign.selection.scores import score_of

RELIABILITY, AT_RESPONSES = 0.88, 512
"""Of a direction, measured in the miniatures (recipes/miniatures); other numbers by Spearman-Brown."""
LOW_RELIABILITY = 0.5
TRAIN, TRUSTED, VAL, FEATURES = "train files", "trusted set", "val files", "features"


class ExaminedData(NamedTuple):
    """What the schedule and the cost are computed from."""

    num_problems: int
    """After verl's length filter."""
    num_trusted: int
    trusted_responses: int
    mean_prompt_tokens: float | None


class Source(NamedTuple):
    """Files of one key of the configuration."""

    area: str
    key: str
    files: Any
    max_samples: int | None = None
    name: str = ""
    """Of a trusted set."""
    n: int = 0
    """Responses to each of its problems."""


def sources_of(config: GradAlignConfig, verl_config: DictConfig) -> Iterator[Source]:
    """Yield what verl and the trainer read: train files, verl's validation files, trusted sets."""
    data = verl_config.data
    yield Source(TRAIN, "data.train_files", _plain(data.train_files), data.get("train_max_samples"))
    yield Source(VAL, "data.val_files", _plain(data.val_files), data.get("val_max_samples"))
    rollout_n = int(verl_config.actor_rollout_ref.rollout.n)
    for trusted in config.validation.trusted_sets() if score_of(config.score).needs_direction else ():
        key = "files" if config.validation.files else f"sets[{trusted.name}].files"
        files, n = list(trusted.files), trusted.n or rollout_n
        yield Source(TRUSTED, f"gradalign.validation.{key}", files, None, trusted.name, n)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def examine_data(
    config: GradAlignConfig, verl_config: DictConfig, tokenizer: Any, findings: Findings
) -> ExaminedData | None:
    """Add findings on the files; return what they hold, or None if the train files cannot be used.

    Whether trained and trusted problems overlap, `checks.check_data` says.
    """
    trial = _reward_trial(verl_config, tokenizer, findings)
    train: Prompts | None = None
    graded: list[Graded] = []
    num_trusted = responses = 0
    for source in sources_of(config, verl_config):
        examined = _examine(source, tokenizer, verl_config, findings)
        if examined is None:
            continue
        frame, prompts, distinct = examined
        if trial is not None and len(prompts.kept) and not any(TIME in earlier.faults for earlier in graded):
            positions = prompts.kept if len(frame) <= MAX_READ else frame.taken
            graded.append(grade(frame, positions, trial, config.success_threshold, findings))
        if source.area == TRAIN:
            train = prompts
            _check_labels(frame, config, findings)
            examine_features(frame, config, verl_config, findings)
        elif source.area == TRUSTED:
            _noise(source.name, min(distinct, prompts.num_left), source.n, findings)
            num_trusted, responses = num_trusted + prompts.num_left, responses + prompts.num_left * source.n
    if trial is not None:
        report(graded, trial, config.success_threshold, findings)
        trial.close()
    if train is None or not train.num_left:
        return None
    return ExaminedData(train.num_left, num_trusted, responses, train.mean_tokens)


def _examine(
    source: Source, tokenizer: Any, verl_config: DictConfig, findings: Findings
) -> tuple[Frame, Prompts, int] | None:
    """Return the rows of one key, what the length filter leaves of them, and how many are distinct."""
    where = (source.area, source.key, source.files, verl_config)
    is_own = has_own_class(verl_config)
    if is_own and tokenizer is None:
        return None
    if is_own:
        frame = frame_of_own_class(*where, tokenizer, findings, source.max_samples or -1)
    else:
        frame = read_frame(*where, findings, source.max_samples)
    if frame is None:
        return None
    num_errors = findings.num_errors
    examine_columns(frame, verl_config, findings)
    if findings.num_errors > num_errors:
        return None
    if is_own:  # which has filtered by length already
        prompts, distinct = Prompts(len(frame), None, frame.taken), len(frame)
    else:
        prompts = examine_prompts(frame, tokenizer, verl_config, findings)
        distinct = examine_repeats(frame, verl_config, findings, _remedy_for_repeats(source))
    return frame, prompts, distinct


def _remedy_for_repeats(source: Source) -> str:
    if source.area == TRUSTED:
        return "keep one row of each problem, and raise gradalign.validation.n for more responses to each"
    return "keep one row of each problem"


def _reward_trial(verl_config: DictConfig, tokenizer: Any, findings: Findings) -> RewardTrial | None:
    """Return the reward manager that verl would make, None with a finding if it could not, or is not to be tried."""
    if verl_config.reward.reward_model.enable:
        findings.add(AREA, "note", "a reward model gives the rewards; it is not asked")
        return None
    function, manager = verl_config.reward.get("custom_reward_function") or {}, verl_config.reward.reward_manager
    shown = f"{FUNCTION}: path={function.get('path')}, name={function.get('name')}"
    try:
        get_custom_reward_fn(verl_config)
        shown = f"reward.reward_manager: name={manager.name}, source={manager.source}"
        return RewardTrial(verl_config, tokenizer)
    except Exception as error:
        cause = f" <- {type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else ""
        why = " ".join(f"{type(error).__name__}: {error}{cause}".split())
        findings.add(AREA, "error", f"{shown} cannot be loaded ({why})", f"correct {shown.partition(':')[0]}")
        return None


def _check_labels(frame: Frame, config: GradAlignConfig, findings: Findings) -> None:
    """Whether the keys of extra_info that the log reports by are there."""
    columns = config.log.columns
    kind = frame.table.data.column("extra_info").type if "extra_info" in frame.columns else pa.struct([])
    known = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    for column in columns:
        is_there = column in known and any(
            pc.struct_field(chunk, column).null_count < len(chunk) for chunk in frame.chunks("extra_info")
        )
        if not is_there:
            text = f"gradalign.log.columns={list(columns)}: no problem of {frame.key} has {column!r} in its extra_info"
            findings.add(frame.area, "error", text, f"use one of {', '.join(known) or '(there are none)'}")


def reliability_of(num_responses: int) -> float:
    """Return the reliability that a direction of so many responses would have had in the miniatures."""
    factor = num_responses / AT_RESPONSES
    return factor * RELIABILITY / (1 + (factor - 1) * RELIABILITY)


def _noise(name: str, num_problems: int, n: int, findings: Findings) -> None:
    """Say how noisy a direction of so many responses is, by the one measurement there is."""
    if not num_problems:
        return
    reliability = reliability_of(num_problems * n)
    text = (
        f"{name}: {num_problems} problems x {n} responses = {num_problems * n}: as many gave the miniatures a "
        f"direction of reliability {reliability:.2f} (measured: {RELIABILITY} at {AT_RESPONSES}; a toy, so only a "
        "hint). Problems always or never solved do not count"
    )
    remedy = "raise gradalign.validation.n, then add problems; watch gradalign/reliability/direction"
    is_low = reliability < LOW_RELIABILITY
    findings.add(TRUSTED, "warning" if is_low else "ok", text, remedy if is_low else "")


def examine_features(frame: Frame, config: GradAlignConfig, verl_config: DictConfig, findings: Findings) -> None:
    """Add findings on what a forecast cannot know of the train files' problems. `frame` holds their rows.

    The user's functions are tried on some, and prompts made tokens: what the trainer does once workers have started.
    """
    if not config.is_forecast:
        return
    # A problem is its row in the train files; verl's data set adds raw_prompt to it.
    rows = {int(place): frame.row(int(place)) for place in frame.taken[:TRIED]}
    rows = {place: {**row, "raw_prompt": row[verl_config.data.prompt_key]} for place, row in rows.items()}
    for name in config.forecast.features:
        if ":" in name:
            with findings.refusals(FEATURES):
                OwnFeatures(name).try_out(rows)
                findings.add(
                    FEATURES, "ok", f"gradalign.forecast.features: {name} gives numbers for {len(rows)} problems"
                )
        elif name == "prompt":
            with findings.refusals(FEATURES, "gradalign.forecast.features=[source,text] asks nothing of the policy"):
                tokens = prompt_tokens(verl_config)
                longest = max(len(tokens(row["raw_prompt"])) for row in rows.values())
                text = (
                    f"gradalign.forecast.features: `prompt` asks the policy, which reads {longest} tokens of the first"
                )
                findings.add(FEATURES, "ok", text)
