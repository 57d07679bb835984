# SPDX-License-Identifier: Apache-2.0
"""Prompts through the chat template: how many tokens they take, how many are left, and what the template does to them.

prompts = examine_prompts(frame, tokenizer, verl_config, findings)
prompts.num_left, prompts.mean_tokens
"""

import statistics
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig
from transformers import AutoTokenizer

from verl_gradalign.doctor.files import Frame
from verl_gradalign.findings import Findings
from verl_gradalign.integration.hub import is_cached

MODEL = "actor_rollout_ref.model"
MAX_READ = 2000
"""Rows of a key that are tokenised; of larger ones as many at random, and the rest by proportion."""


class Prompts(NamedTuple):
    """What is left of a frame."""

    num_left: int
    """Problems after verl's length filter."""
    mean_tokens: float | None
    kept: np.ndarray
    """Positions of those rows that were read and are left."""


def read_tokenizer(verl_config: DictConfig, findings: Findings) -> Any:
    """Return the tokenizer as verl sets it up, None with a finding if there is none."""
    model = verl_config.actor_rollout_ref.model
    key = "tokenizer_path" if model.get("tokenizer_path") else "path"
    path = str(model[key])
    if path.startswith("hdfs:"):
        findings.add("model", "note", f"{MODEL}.{key}={path} is not on this machine; no prompt is measured")
        return None
    try:
        is_local = is_cached(f"{MODEL}.{key}", path, "tokenizer_config.json")
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=model.trust_remote_code, local_files_only=is_local
        )
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{MODEL}.path="):
            return None  # what is wrong with the path is said of the model
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        text = f"{MODEL}.{key}={path}: the tokenizer cannot be loaded ({why}), so no prompt is measured"
        findings.add("model", "error", text, f"set {MODEL}.tokenizer_path to a folder with a tokenizer")
        return None
    if model.get("custom_chat_template") is not None:
        tokenizer.chat_template = model.custom_chat_template
    if tokenizer.chat_template is None:
        text = f"{MODEL}.{key}={path}: its tokenizer has no chat template, which verl puts every prompt through"
        remedy = f"set {MODEL}.custom_chat_template, or {MODEL}.tokenizer_path to a tokenizer that has one"
        findings.add("model", "error", text, remedy)
        return None
    return tokenizer


def examine_prompts(frame: Frame, tokenizer: Any, verl_config: DictConfig, findings: Findings) -> Prompts:
    """Add findings on lengths and template; return what verl's filter leaves."""
    data = verl_config.data
    positions = frame.taken
    if len(positions) > MAX_READ:
        positions = np.sort(np.random.default_rng(0).choice(positions, MAX_READ, replace=False))
    if tokenizer is None:
        return Prompts(len(frame), None, positions)
    options, column = dict(data.get("apply_chat_template_kwargs") or {}), data.get("prompt_key", "prompt")
    options.pop("tokenize", None)
    rows = frame.table.select_columns([column]).select(positions)[column]
    rendered: list[str | None] = []
    failed: dict[int, str] = {}
    for position, messages in zip(positions, rows, strict=True):
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
            rendered.append(text)
        except Exception as error:
            rendered.append(None)
            failed[int(position)] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    _failures(frame, failed, bool(data.get("filter_overlong_prompts")), findings)
    texts = [text for text in rendered if text is not None]
    if not texts:
        return Prompts(0, None, positions[:0])
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    _lost_words(frame, positions, rows, rendered, findings)
    num_left, kept = _left(frame, positions, rendered, lengths, verl_config, findings)
    return Prompts(num_left, statistics.fmean(lengths), kept)


def _failures(frame: Frame, failed: dict[int, str], is_filtered: bool, findings: Findings) -> None:
    """Say that the chat template refuses prompts, which a rollout then fails on, or verl leaves out without a word."""
    if not failed:
        return
    position, why = next(iter(failed.items()))
    others = f" (and {len(failed) - 1} more rows)" if len(failed) > 1 else ""
    what = "verl leaves it out" if is_filtered else "its rollout fails"
    text = f"{frame.place(position)}: the chat template refuses the prompt, so {what} ({why}){others}"
    remedy = f"give messages with the roles that the template knows, or set {MODEL}.custom_chat_template"
    findings.add(frame.area, "warning" if is_filtered else "error", text, remedy)


def _lost_words(frame: Frame, positions: np.ndarray, rows: Any, rendered: list[str | None], findings: Findings) -> None:
    """Say where the template leaves a message out, or adds a system turn that no row has."""
    for position, messages, text in zip(positions, rows, rendered, strict=True):
        for message in messages if text is not None else ():
            content = message["content"]
            if isinstance(content, str) and text is not None and content.strip() not in text:
                shown = f"{message['role']} turn {content.strip()[:60]!r}"
                what = f"the chat template leaves its {shown} out, or changes it"
                remedy = f"set {MODEL}.custom_chat_template, or leave the turn out of the files"
                findings.add(frame.area, "warning", f"{frame.place(int(position))}: {what}", remedy)
                return
    messages, text = next((m, t) for m, t in zip(rows, rendered, strict=True) if t is not None)
    added = text.partition(str(messages[0]["content"]))[0].strip() if messages[0]["content"] else ""
    if "system" in added and messages[0]["role"] != "system":
        findings.add(frame.area, "note", f"{frame.key}: the chat template adds a system turn: {added[:120]!r}")


def _left(
    frame: Frame,
    positions: np.ndarray,
    rendered: list[str | None],
    lengths: list[int],
    verl_config: DictConfig,
    findings: Findings,
) -> tuple[int, np.ndarray]:
    """Compare the prompts' tokens with the most that verl takes; return how many problems and which rows are left."""
    data, most = verl_config.data, verl_config.data.max_prompt_length
    length_of = dict(zip([p for p, t in zip(positions, rendered, strict=True) if t is not None], lengths, strict=True))
    fits = np.array([length_of.get(p, most + 1) <= most for p in positions])
    num_over = sum(length > most for length in lengths)
    is_filtered = bool(data.get("filter_overlong_prompts"))
    num_left = len(frame) if not is_filtered else round(len(frame) * float(fits.mean()))
    text = f"prompts take {statistics.fmean(lengths):.0f} tokens on average, {max(lengths)} at most"
    too_long = f"{frame.key}: {text}: {num_over} of {len(lengths)} read are longer than data.max_prompt_length={most}"
    remedy = f"set data.max_prompt_length={max(lengths)}"
    if not num_over:
        findings.add(frame.area, "ok", f"{text}, of data.max_prompt_length={most}")
    elif is_filtered:
        level = "error" if not fits.any() else "warning"
        about = "" if len(positions) == len(frame) else "about "
        left = f"{too_long} and will be left out; {about}{num_left:,} problems are left"
        findings.add(frame.area, level, left, remedy)
    else:
        remedy = f"{remedy}, or data.filter_overlong_prompts=true to leave them out"
        findings.add(frame.area, "error", too_long, remedy)
    return num_left, positions[fits] if is_filtered else positions
