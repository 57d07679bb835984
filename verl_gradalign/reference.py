# SPDX-License-Identifier: Apache-2.0
"""The two reference pages, made of what the code itself goes by, so that they cannot say anything else.

configs/gradalign/README.md is made of the dataclasses of `verl_gradalign.config` and the text below each of their
fields; recipes/how_to/metrics.md of `metrics.CATALOGUE`. `make docs` is

    python -m verl_gradalign.reference
"""

import argparse
import ast
import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from inspect import cleandoc, getsource
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from verl_gradalign import config
from verl_gradalign.config import GradAlignConfig
from verl_gradalign.files import replace_file
from verl_gradalign.markdown import markdown_table
from verl_gradalign.metrics import CATALOGUE, PREFIX

CHECKOUT = Path(__file__).parents[1]

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}

CONFIGURATION_HEAD = """
# Every key of `gradalign:`

Made by `make docs` from [verl_gradalign/config.py](../../verl_gradalign/config.py); change it there. On verl's command
line `+gradalign=NAME` loads one of the files beside this page: [base.yaml](base.yaml) with all defaults and the
trainer's own keys, then the score that gives the file its name. Every key may be overridden behind it
(`gradalign.direction.refresh_interval=5`); only keys of entries that are not there yet need a `+`. A regime
(`+regime=...`) stands behind `+gradalign=...`, or it is refused.

What is out of its range, of another type or unknown is refused before any worker starts, with the key, the value and
the remedy ([test](../../tests/unit/test_config.py)).
"""

METRICS_HEAD = """
# Every metric

Made by `make docs` from [verl_gradalign/metrics.py](../../verl_gradalign/metrics.py); change it there. A name that is
not in this list is refused when it is logged. All of them go to every logger of verl (console, file, wandb, ...) and
into the `metrics` table of the selection log. A metric appears in the steps that it is measured in: without a scored
candidate there is no score. `<...>` stands for a word of the run's own.

What they mean for your run stands in [Read the report](read_report.md); the symbols are those of the
[README](../../README.md#scores): v the direction, g the gradient of a problem's loss.
"""


class Key(NamedTuple):
    """One key as a user writes it, with its type in words or the names it may have, and what stands below the field."""

    name: str
    values: str
    default: str
    text: str


class Block(NamedTuple):
    """The keys of one dataclass."""

    name: str
    text: str
    keys: list[Key]


def field_texts() -> dict[str, str]:
    """Return the string below each field of the configuration's classes, by "class.field"."""
    return {
        f"{node.name}.{ast.unparse(field.target)}": " ".join(cleandoc(ast.literal_eval(below.value)).split())
        for node in ast.parse(getsource(config)).body
        if isinstance(node, ast.ClassDef)
        for field, below in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def choices_of_keys(cls: Any = GradAlignConfig, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Return the names that a key may have, for every key that has some (by its name without `gradalign.`)."""
    from verl_gradalign.selection.scores import SCORES

    choices = {"score": tuple(SCORES)} if cls is GradAlignConfig else {}
    for field in fields(cls):
        if is_dataclass(field.default_factory):
            choices |= choices_of_keys(field.default_factory, f"{field.name}.")
        elif field.metadata.get("one_of"):
            choices[prefix + field.name] = field.metadata["one_of"]
    return choices


def blocks_of(cls: Any = GradAlignConfig, name: str = "gradalign") -> list[Block]:
    """Return the block of a dataclass, and behind it those that it contains.

    Raises: ValueError that names a field without a text.
    """
    texts, hints, choices = field_texts(), get_type_hints(cls), choices_of_keys()
    keys, inner = [], []
    for field in fields(cls):
        key, hint, where = f"{name}.{field.name}", hints[field.name], f"{cls.__name__}.{field.name}"
        if is_dataclass(hint):
            inner += blocks_of(hint, key)
            continue
        types, names = get_args(hint) or (hint,), choices.get(key.removeprefix("gradalign."))
        if is_dataclass(types[0]):
            inner += blocks_of(types[0], f"{key}[]")
            values = "list of blocks"
        elif names:
            values = ", ".join(f"`{each}`" for each in names) + (" or null" if type(None) in types else "")
        else:
            values = f"list: {WORDS[types[0]]}" if get_origin(hint) is tuple else " or ".join(WORDS[t] for t in types)
        if where not in texts:
            raise ValueError(f"{key}: nothing stands below {where}. Remedy: say there what it means.")
        # JSON is YAML, where words need no quotes.
        words = field.default if isinstance(field.default, str) else ""
        text = re.sub(r"\bNone\b", "null", texts[where])
        keys.append(Key(key, values, words or json.dumps(field.default), text))
    return [Block(name, " ".join(cleandoc(cls.__doc__ or "").split("\n\n")[0].split()), keys), *inner]


def cell(text: str) -> str:
    """Return the text for a cell of a Markdown table: outside of `code` nothing is taken for markup."""
    parts = text.replace("|", r"\|").split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*") for part in parts[::2]]
    return "`".join(parts)


def configuration_page() -> str:
    """Return the page of every key."""
    parts = [CONFIGURATION_HEAD.strip()]
    for block in blocks_of():
        rows = [(f"`{key.name}`", f"`{key.default}`", cell(key.values), cell(key.text)) for key in block.keys]
        parts += [f"## `{block.name}`", block.text, markdown_table(("key", "default", "values", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def metrics_page() -> str:
    """Return the page of every metric."""
    parts = [METRICS_HEAD.strip()]
    for group, metrics in groupby(CATALOGUE, key=lambda metric: metric.group):
        rows = [(f"`{PREFIX}{metric.name}`", cell(metric.unit), cell(metric.formula)) for metric in metrics]
        parts += [f"## {group}", markdown_table(("metric", "unit", "what it is"), rows)]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Return the text of both pages, by path in the checkout."""
    return {"configs/gradalign/README.md": configuration_page(), "recipes/how_to/metrics.md": metrics_page()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(prog="python -m verl_gradalign.reference", description="Write both pages.")
    parser.add_argument("--output", type=Path, default=CHECKOUT, metavar="ROOT", help="default: this checkout")
    output = parser.parse_args(arguments).output
    for path, text in pages().items():
        replace_file(output / path, text)
        print(f"wrote {output / path}")


if __name__ == "__main__":
    main()
