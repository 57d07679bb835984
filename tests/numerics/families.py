# SPDX-License-Identifier: Apache-2.0
"""Every family of causal language models that transformers has, tiny and in float64, through ghost and backward.

    python -m tests.numerics.families > recipes/how_to/models.md
    python -m tests.numerics.families --only llama,gemma3_text

A family is exact, refused with the layer's name, or cannot be built or run here as its configuration stands.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from verl_gradalign.integration.model_trial import MAX_PARAMETERS, shrunk
from verl_gradalign.probe.layer_rules import LayerCall, LayerScores
from verl_gradalign.probe.responses import Response
from verl_gradalign.probe.score_problems import score_problems
from verl_gradalign.probe.tap_points import TapPoint
from verl_gradalign.probe.taps import Taps

RTOL = 1e-10
"""Largest error of products and norms, as a share of the gradients' norms."""
MAX_BYTES = 8 * 2**30
EXACT, REFUSED, WRONG, UNTRIED = "exact", "refused", "wrong", "untried"
HEAD = """# Which models

`ghost`, the default estimator, has a rule for each kind of layer. Below stands what came of every family of causal
language models in transformers {version}: a tiny model of random weights, in float64, all parameters trained, each
problem's product and norm compared with autograd (at most 1e-10 of the gradient's norm off). A run asks the same of its
own model before workers start, and takes `gradalign.estimator=backward` or
[a rule of your own](layer_rule.md) for what is refused; adapters (LoRA) on linear layers alone need no other rule.
The page is written by [families.py](../../tests/numerics/families.py).
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a family."""

    family: str
    kind: str
    why: str = ""


class InFloat64(TorchFunctionMode):
    """Gives float64 where a model's code asks for float32, as norms, softmaxes and rotations do."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextmanager
def float64_by_default() -> Iterator[None]:
    by_rule = Taps._by_rule

    def in_float64(taps: Taps, point: TapPoint, call: LayerCall) -> LayerScores:
        with InFloat64():  # a backward pass runs without the modes around it
            return by_rule(taps, point, call)

    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64(), mock.patch.object(Taps, "_by_rule", in_float64):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def try_family(family: str) -> Outcome:
    """Build a tiny model of the family and score it."""
    try:
        with float64_by_default():
            model = build(family)
    except Exception:  # whatever a model's own code makes of unusual sizes
        return Outcome(family, UNTRIED, "cannot be built")
    if model is None:
        return Outcome(family, UNTRIED, "too large when shrunk")
    trusted, candidates = problems(0, 2), problems(2, 3)
    with float64_by_default():
        try:
            exact = score_problems(model, trusted, candidates, estimator="backward")
        except Exception:
            return Outcome(family, UNTRIED, "does not run")
        try:
            scores = score_problems(model, trusted, candidates)
        except (ValueError, RuntimeError) as error:
            return Outcome(family, REFUSED, str(error))
    assert scores.norm_P is not None and exact.norm_P is not None
    errors_2P = torch.stack([(scores.dot_P - exact.dot_P).abs(), (scores.norm_P - exact.norm_P).abs()])
    largest = float((errors_2P / exact.norm_P).max())
    return Outcome(family, EXACT if largest <= RTOL else WRONG, f"{largest:.1e}")


def build(family: str) -> nn.Module | None:
    """Return a tiny model of random weights without dropout, None if it is not tiny."""
    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(family)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
        part._experts_implementation = "eager"  # the grouped product has no float64
    small = shrunk(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(small, attn_implementation="eager").parameters())
    if size > MAX_PARAMETERS / 4:
        return None
    model: nn.Module = AutoModelForCausalLM.from_config(small, attn_implementation="eager").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def problems(first: int, num: int) -> list[list[Response]]:
    """Return problems of random tokens, two responses each, of different lengths."""
    made = []
    for seed in range(first, first + num):
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(1, 150, (6 + length,), generator=generator).tolist() for length in (5 + seed, 7 + seed)]
        made.append([Response(i[:6], i[6:], sign) for i, sign in zip(ids, (1.0, -0.5), strict=True)])
    return made


def try_all(families: Sequence[str], note: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    outcomes = []
    for family in families:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.append(try_family(family))
        note(outcomes[-1])
    return outcomes


def page(outcomes: Sequence[Outcome], version: str) -> str:
    """Return the page of all families."""
    by_kind: Mapping[str, list[Outcome]] = {
        kind: [outcome for outcome in outcomes if outcome.kind == kind] for kind in (EXACT, REFUSED, WRONG, UNTRIED)
    }
    counts = f"{len(by_kind[EXACT])} are exact, {len(by_kind[REFUSED])} refused by the layer's name, "
    counts += f"{len(by_kind[UNTRIED])} could not be tried here"
    parts = [HEAD.format(version=version), f"Of {len(outcomes)} families {counts}."]
    parts.append("## Exact\n\n" + ", ".join(f"`{outcome.family}`" for outcome in by_kind[EXACT]) + ".")
    rows = [f"| `{outcome.family}` | {first_layer(outcome.why)} |" for outcome in by_kind[REFUSED]]
    parts.append("\n".join(["## Refused by name", "", "| family | by |", "| --- | --- |", *rows]))
    rows = [f"| `{outcome.family}` | {outcome.why} |" for outcome in by_kind[UNTRIED]]
    head = "As their configuration stands, shrunk to a few narrow layers, on a CPU."
    parts.append("\n".join(["## Not tried", "", head, "", "| family | why |", "| --- | --- |", *rows]))
    assert not by_kind[WRONG], by_kind[WRONG]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def first_layer(why: str) -> str:
    """Return what a refusal says of the layer, without the remedy."""
    text = why.partition(" Remedy")[0].partition(": the scores would")[0].removeprefix("no layer rule covers ")
    return text.replace("|", "/").rstrip(".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    import transformers

    # Some architectures ask for more than there is when they are shrunk.
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
    families = args.only.split(",") if args.only else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    note = lambda outcome: print(outcome.family, outcome.kind, outcome.why[:150], file=sys.stderr, flush=True)  # noqa: E731
    outcomes = try_all(families, note)
    if not args.only:
        print(page(outcomes, transformers.__version__), end="")


if __name__ == "__main__":
    main()
