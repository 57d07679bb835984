# SPDX-License-Identifier: Apache-2.0
"""The trusted sets and the train files: how many, how long, how noisy, and whether their rewards can be computed."""

from __future__ import annotations

import asyncio
import inspect
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.reward_score import default_compute_score

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.findings import Findings

__all__ = ["ExaminedData", "examine_data"]

MAX_TOKENISED = 1000
"""Rows of a file that are tokenised."""
RELIABILITY, AT_RESPONSES = 0.88, 512
"""Of a direction, measured in the miniatures (recipes/miniatures); other numbers by Spearman-Brown."""
LOW_RELIABILITY = 0.5
RUNS_CODE = ("codecontests", "apps", "codeforces", "taco")
"""Data sources whose default reward runs programs; they are not tried."""


@dataclass(frozen=True)
class ExaminedData:
    """What the cost is computed from."""

    num_problems: int
    num_trusted: int
    trusted_responses: int
    mean_prompt_tokens: float | None


def examine_data(config: GradAlignConfig, verl_config: DictConfig, needs_trusted: bool, findings: Findings) -> Any:
    """Add findings on the files; return an `ExaminedData`, or None if the train files cannot be read.

    Whether the two overlap, and whether the problems last for the schedule, `checks.check_data` says.
    """
    rollout_n = int(verl_config.actor_rollout_ref.rollout.n)
    tokenizer = _tokenizer(verl_config, findings)
    files: Any = verl_config.data.train_files
    train = _rows("train files", [files] if isinstance(files, str) else files, findings)
    lengths = _check_rows("train files", train, tokenizer, verl_config, findings)
    num_trusted = responses = 0
    for trusted in config.validation.trusted_sets() if needs_trusted else ():
        rows = _rows("trusted set", trusted.files, findings)
        _check_rows("trusted set", rows, tokenizer, verl_config, findings)
        n = trusted.n or rollout_n
        if rows:
            _noise(trusted.name, len(rows), n, findings)
        num_trusted, responses = num_trusted + len(rows), responses + len(rows) * n
    limit = verl_config.data.get("train_max_samples", -1)
    num_problems = len(train) if limit is None or limit < 0 else min(len(train), limit)
    if not num_problems:
        return None
    return ExaminedData(num_problems, num_trusted, responses, statistics.fmean(lengths) if lengths else None)


def reliability_of(num_responses: int) -> float:
    """Return the reliability that a direction of so many responses would have had in the miniatures."""
    factor = num_responses / AT_RESPONSES
    return factor * RELIABILITY / (1 + (factor - 1) * RELIABILITY)


def _noise(name: str, num_problems: int, n: int, findings: Findings) -> None:
    """Say how noisy a direction of so many responses is, by the one measurement there is."""
    num = num_problems * n
    reliability = reliability_of(num)
    is_low = reliability < LOW_RELIABILITY
    findings.add(
        "trusted set",
        "warning" if is_low else "ok",
        f"{name}: {num_problems} problems x {n} responses = {num}: as many gave the miniatures a direction of "
        f"reliability {reliability:.2f} (measured: {RELIABILITY} at {AT_RESPONSES}; a toy, so only a hint). Problems "
        "always or never solved do not count",
        "raise gradalign.validation.n, then add problems; watch gradalign/reliability/direction" if is_low else "",
    )


def _tokenizer(verl_config: DictConfig, findings: Findings) -> Any:
    model = verl_config.actor_rollout_ref.model
    try:
        return AutoTokenizer.from_pretrained(
            str(model.get("tokenizer_path") or model.path), trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        text = f"the tokenizer of {model.path} cannot be loaded ({why}), so no prompt is measured"
        findings.add("model", "error", text, "set actor_rollout_ref.model.tokenizer_path")
        return None


def _rows(area: str, files: Iterable[Any], findings: Findings) -> list[dict[str, Any]]:
    """Return the rows of the files; of one that cannot be read nothing, which `check_data` refuses with its name."""
    rows: list[dict[str, Any]] = []
    for name in files:
        path = Path(str(name)).expanduser()
        kind = "parquet" if path.suffix == ".parquet" else "json"
        if path.is_file():
            with findings.refusals(area):
                rows.extend(datasets.load_dataset(kind, data_files=str(path), split="train").to_list())
    return rows


def _check_rows(
    area: str, rows: list[dict[str, Any]], tokenizer: Any, verl_config: DictConfig, findings: Findings
) -> list[int]:
    """Add findings on lengths, ground truths and rewards of rows; return the prompts' tokens."""
    if not rows:
        return []
    lengths = [] if tokenizer is None else _prompt_lengths(area, rows, tokenizer, verl_config, findings)
    if lengths:
        _check_lengths(area, lengths, verl_config, findings)
    without = [row for row in rows if (row.get("reward_model") or {}).get("ground_truth") in (None, "")]
    if without:
        own = OmegaConf.select(verl_config, "reward.custom_reward_function.path")
        text = f"{len(without)} of {len(rows)} problems have no reward_model.ground_truth"
        level = "warning" if own or verl_config.reward.reward_model.enable else "error"
        findings.add(area, level, text, "add the answers, or use a reward function that needs none")
    if not verl_config.reward.reward_model.enable:
        _check_reward(area, rows, verl_config, findings)
    return lengths


def _prompt_lengths(
    area: str, rows: list[dict[str, Any]], tokenizer: Any, verl_config: DictConfig, findings: Findings
) -> list[int]:
    data = verl_config.data
    options = dict(data.get("apply_chat_template_kwargs") or {})
    lengths: list[int] = []
    with findings.refusals(area, "give prompts as verl's schema has them: lists of messages with role and content"):
        for row in rows[:MAX_TOKENISED]:
            text = tokenizer.apply_chat_template(
                row[data.prompt_key], add_generation_prompt=True, tokenize=False, **options
            )
            lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return lengths


def _check_lengths(area: str, lengths: list[int], verl_config: DictConfig, findings: Findings) -> None:
    most = verl_config.data.max_prompt_length
    num_over = sum(length > most for length in lengths)
    text = f"prompts take {statistics.fmean(lengths):.0f} tokens on average, {max(lengths)} at most"
    if not num_over:
        findings.add(area, "ok", f"{text}, of data.max_prompt_length={most}")
        return
    text = f"{text}: {num_over} of {len(lengths)} looked at are longer than data.max_prompt_length={most}"
    remedy = f"set data.max_prompt_length={max(lengths)}"
    if verl_config.data.get("filter_overlong_prompts"):
        level = "error" if num_over == len(lengths) else "warning"
        findings.add(area, level, f"{text} and will be left out", remedy)
    else:
        findings.add(area, "error", text, f"{remedy}, or data.filter_overlong_prompts=true to leave them out")


def _check_reward(area: str, rows: list[dict[str, Any]], verl_config: DictConfig, findings: Findings) -> None:
    """Ask the reward function for the reward of an empty answer to one problem of each data source."""
    try:
        own = get_custom_reward_fn(verl_config)
    except Exception as error:
        key = "reward.custom_reward_function"
        findings.refusal(
            "reward", ValueError(f"{key}: cannot be loaded ({type(error).__name__}: {error})"), f"fix {key}"
        )
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
        except Exception as error:
            if own is None and isinstance(error, NotImplementedError):
                unknown.append(source)  # verl's way to say that it does not know a data source
                continue
            text = f"{area}: the reward of an empty answer (data source {source!r}) fails: "
            remedy = "fix the reward function, or the ground truth of this source"
            findings.add("reward", "error", f"{text}{type(error).__name__}: {error}", remedy)
        else:
            num_right += 1
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
    if inspect.isawaitable(value):
        value = asyncio.run(_awaited(value))
    score = value["score"] if isinstance(value, dict) else value
    float(score[0] if isinstance(score, list | tuple) else score)


async def _awaited(value: Any) -> Any:
    return await value
