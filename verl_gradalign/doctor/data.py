# SPDX-License-Identifier: Apache-2.0
"""The trusted sets and the train files: how many, how long, how noisy, and whether their rewards can be computed."""

import asyncio
import inspect
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.reward_score import default_compute_score

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.findings import Findings
from verl_gradalign.selection.scores import score_of

MAX_TOKENISED = 1000
"""Rows of a file that are tokenised."""
RELIABILITY, AT_RESPONSES = 0.88, 512
"""Of a direction, measured in the miniatures (recipes/miniatures); other numbers by Spearman-Brown."""
LOW_RELIABILITY = 0.5
RUNS_CODE = ("codecontests", "apps", "codeforces", "taco")
"""Data sources whose default reward runs programs; they are not tried."""


class ExaminedData(NamedTuple):
    """What the cost is computed from."""

    num_problems: int
    num_trusted: int
    trusted_responses: int
    mean_prompt_tokens: float | None


def examine_data(config: GradAlignConfig, verl_config: DictConfig, findings: Findings) -> ExaminedData | None:
    """Add findings on the files; return what they hold, or None if the train files cannot be read.

    Whether the two overlap, and whether the problems last for the schedule, `checks.check_data` says.
    """
    tokenizer = _tokenizer(verl_config, findings)
    files: Any = verl_config.data.train_files
    files = [files] if isinstance(files, str) else files
    num_problems, lengths = _examine_files("train files", files, tokenizer, verl_config, findings)
    num_trusted = responses = 0
    for trusted in config.validation.trusted_sets() if score_of(config.score).needs_direction else ():
        num, _ = _examine_files("trusted set", trusted.files, tokenizer, verl_config, findings)
        n = trusted.n or int(verl_config.actor_rollout_ref.rollout.n)
        if num:
            _noise(trusted.name, num, n, findings)
        num_trusted, responses = num_trusted + num, responses + num * n
    limit = verl_config.data.get("train_max_samples", -1)
    num_problems = num_problems if limit is None or limit < 0 else min(num_problems, limit)
    if not num_problems:
        return None
    return ExaminedData(num_problems, num_trusted, responses, statistics.fmean(lengths) if lengths else None)


def reliability_of(num_responses: int) -> float:
    """Return the reliability that a direction of so many responses would have had in the miniatures."""
    factor = num_responses / AT_RESPONSES
    return factor * RELIABILITY / (1 + (factor - 1) * RELIABILITY)


def _noise(name: str, num_problems: int, n: int, findings: Findings) -> None:
    """Say how noisy a direction of so many responses is, by the one measurement there is."""
    reliability = reliability_of(num_problems * n)
    text = (
        f"{name}: {num_problems} problems x {n} responses = {num_problems * n}: as many gave the miniatures a "
        f"direction of reliability {reliability:.2f} (measured: {RELIABILITY} at {AT_RESPONSES}; a toy, so only a "
        "hint). Problems always or never solved do not count"
    )
    remedy = "raise gradalign.validation.n, then add problems; watch gradalign/reliability/direction"
    is_low = reliability < LOW_RELIABILITY
    findings.add("trusted set", "warning" if is_low else "ok", text, remedy if is_low else "")


def _tokenizer(verl_config: DictConfig, findings: Findings) -> Any:
    model = verl_config.actor_rollout_ref.model
    path = str(model.get("tokenizer_path") or model.path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        text = f"the tokenizer of {model.path} cannot be loaded ({why}), so no prompt is measured"
        findings.add("model", "error", text, "set actor_rollout_ref.model.tokenizer_path")
        return None


def _examine_files(
    area: str, files: Iterable[Any], tokenizer: Any, verl_config: DictConfig, findings: Findings
) -> tuple[int, list[int]]:
    """Add findings on lengths, ground truths and rewards; return the number of problems, and their prompts' tokens.

    A file that cannot be read has none: `check_data` refuses it with its name.
    """
    rows: list[dict[str, Any]] = []
    for path in (Path(str(name)).expanduser() for name in files):
        if path.is_file():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            with findings.refusals(area):
                rows.extend(datasets.load_dataset(kind, data_files=str(path), split="train").to_list())
    if not rows:
        return 0, []
    lengths = [] if tokenizer is None else _lengths(area, rows, tokenizer, verl_config, findings)
    without = [row for row in rows if (row.get("reward_model") or {}).get("ground_truth") in (None, "")]
    if without:
        own = OmegaConf.select(verl_config, "reward.custom_reward_function.path")
        text = f"{len(without)} of {len(rows)} problems have no reward_model.ground_truth"
        level = "warning" if own or verl_config.reward.reward_model.enable else "error"
        findings.add(area, level, text, "add the answers, or use a reward function that needs none")
    if not verl_config.reward.reward_model.enable:
        _check_reward(area, rows, verl_config, findings)
    return len(rows), lengths


def _lengths(
    area: str, rows: list[dict[str, Any]], tokenizer: Any, verl_config: DictConfig, findings: Findings
) -> list[int]:
    """Compare the prompts' tokens with the most that verl takes; return them, none if they cannot be read."""
    data = verl_config.data
    options, most = dict(data.get("apply_chat_template_kwargs") or {}), data.max_prompt_length
    lengths: list[int] = []
    with findings.refusals(area, "give prompts as verl's schema has them: lists of messages with role and content"):
        for row in rows[:MAX_TOKENISED]:
            messages = row[data.prompt_key]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
            lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    if not lengths:
        return lengths
    num_over = sum(length > most for length in lengths)
    text = f"prompts take {statistics.fmean(lengths):.0f} tokens on average, {max(lengths)} at most"
    too_long = f"{text}: {num_over} of {len(lengths)} read are longer than data.max_prompt_length={most}"
    remedy = f"set data.max_prompt_length={max(lengths)}"
    if not num_over:
        findings.add(area, "ok", f"{text}, of data.max_prompt_length={most}")
    elif data.get("filter_overlong_prompts"):
        level = "error" if num_over == len(lengths) else "warning"
        findings.add(area, level, f"{too_long} and will be left out", remedy)
    else:
        findings.add(area, "error", too_long, f"{remedy}, or data.filter_overlong_prompts=true to leave them out")
    return lengths


def _check_reward(area: str, rows: list[dict[str, Any]], verl_config: DictConfig, findings: Findings) -> None:
    """Ask the reward function for the reward of an empty answer to one problem of each data source."""
    key = "reward.custom_reward_function"
    try:
        own = get_custom_reward_fn(verl_config)
    except Exception as error:
        text = f"{key}: cannot be loaded ({type(error).__name__}: {error})"
        findings.refusal("reward", ValueError(text), f"fix {key}")
        return
    reward_key = verl_config.data.get("reward_fn_key", "data_source")
    by_source: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_source.setdefault(str(row.get(reward_key)), row)
    num_right, unknown = 0, []
    for source, row in by_source.items():
        if own is None and source in RUNS_CODE:
            findings.add("reward", "note", f"{area}: data source {source} runs programs; its reward was not tried")
            continue
        try:
            _reward(own or default_compute_score, source, row)
            num_right += 1
        except Exception as error:
            if own is None and isinstance(error, NotImplementedError):
                unknown.append(source)  # verl's way to say that it does not know a data source
                continue
            text = f"{area}: the reward of an empty answer (data source {source!r}) fails: "
            remedy = "fix the reward function, or the ground truth of this source"
            findings.add("reward", "error", f"{text}{type(error).__name__}: {error}", remedy)
    if unknown:
        text = f"{area}: verl has no reward function for data source {', '.join(unknown[:10])}"
        findings.add("reward", "error", text, "name yours in reward.custom_reward_function.path and .name")
    if num_right:
        names = ", ".join(list(by_source)[:3]) + (" and others" if len(by_source) > 3 else "")
        text = f"{area}: {num_right} of {len(by_source)} data sources ({names}) have a reward function that runs"
        findings.add("reward", "ok", text)


def _reward(function: Any, source: str, row: Mapping[str, Any]) -> None:
    value = function(
        data_source=source,
        solution_str="",
        ground_truth=(row.get("reward_model") or {}).get("ground_truth"),
        extra_info=row.get("extra_info") or {},
    )
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    score = value["score"] if isinstance(value, dict) else value
    float(score[0] if isinstance(score, list | tuple) else score)
