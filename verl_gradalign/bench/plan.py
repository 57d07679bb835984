# SPDX-License-Identifier: Apache-2.0
"""What one call of the command is to do, checked before anything runs."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from verl_gradalign.bench.registry import NAMES, PARTS, Part
from verl_gradalign.errors import refuse

USUAL_MINUTES = 40.0
NUM_DRY_DEVICES = 2
WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
SAVED = "give a folder that transformers' save_pretrained wrote: config.json, weights and tokenizer"


@dataclass(frozen=True)
class Plan:
    """The parts that are run, where their results go, and how long all may take.

    Raises: ValueError naming the option, its value and the remedy.
    """

    output: Path
    minutes: float = USUAL_MINUTES
    only: tuple[str, ...] = ()
    """Names of parts; empty: all."""
    is_dry_run: bool = False
    model: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            refuse("--minutes", self.minutes, "must be above 0", f"leave it out for {USUAL_MINUTES:g}, or give more")
        for name in self.only:
            if name not in NAMES:
                refuse("--only", name, f"unknown; known are {', '.join(NAMES)}", f"write for example --only {NAMES[0]}")
        if self.model is not None:
            check_model(self.model)
        for part in PARTS:
            if part.needs_model and part.name in self.only and self.model is None:
                refuse("--only", part.name, "it trains a model of yours, and none was given", "add --model FOLDER")
        _check_output(self.output)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return what is run, in order of value."""
        return tuple(part for part in PARTS if not self.only or part.name in self.only)

    def missing(self, part: Part) -> str | None:
        """Return why a part cannot be run here, None if it can."""
        return part.missing(self.is_dry_run, self.model is not None)

    def limit_s(self, part: Part) -> float:
        """Return the seconds that a part may take: more where there is more time, but not less where there is less."""
        return part.limit_s * max(1.0, self.minutes / USUAL_MINUTES)

    @property
    def expected_s(self) -> float:
        """Return the seconds that all parts may be expected to take, those left out that cannot run."""
        run = (part for part in self.parts if self.missing(part) is None)
        return sum(part.dry_s if self.is_dry_run else part.expected_s for part in run)


def check_model(folder: Path) -> None:
    """Raise ValueError if verl could not load a model from the folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        refuse("--model", folder, "is no folder", SAVED)
    if not path.is_file():
        refuse("--model", folder, "has no config.json", SAVED)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        refuse("--model", folder, f"its config.json is no JSON ({error})", SAVED)
    if not isinstance(config, dict) or "model_type" not in config:
        refuse("--model", folder, "its config.json names no model_type", SAVED)
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        refuse("--model", folder, f"has no weights ({' or '.join(WEIGHTS)})", SAVED)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        refuse("--model", folder, f"has no tokenizer ({', '.join(TOKENIZERS)})", SAVED)


def _check_output(folder: Path) -> None:
    """Raise ValueError if nothing can be written there. Asked by writing: permissions know no read-only mounts."""
    remedy = "give a folder that can be written, such as --output outputs/bench"
    if folder.exists() and not folder.is_dir():
        refuse("--output", folder, "is a file", remedy)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        refuse("--output", folder, f"cannot be written ({error.strerror})", remedy)


def num_devices(is_dry_run: bool) -> int:
    """Return the accelerators here, in a dry run the processes that stand for them.

    Raises: ValueError where torch or transformers are missing, or where there is no accelerator.
    """
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed, and nothing runs without it. Remedy: pip install {package}.")
    if is_dry_run:
        return NUM_DRY_DEVICES
    import torch

    if not torch.accelerator.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        why = f"torch {torch.__version__}, built for {built}, sees no accelerator here"
        refuse("--dry-run", None, why, "run this where training runs, or add --dry-run to try the kit on a CPU")
    return torch.accelerator.device_count()
