# SPDX-License-Identifier: Apache-2.0
"""What schedule forecast knows problems by: the user's functions, tried on rows, and prompts, turned into tokens.

The constructor of the trainer's own features does the same, once workers have started.
"""

from omegaconf import DictConfig

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.doctor.files import Frame
from verl_gradalign.findings import Findings
from verl_gradalign.integration.features import TRIED
from verl_gradalign.integration.prompt_states import prompt_tokens
from verl_gradalign.selection.own_features import OwnFeatures

AREA = "features"


def examine_features(frame: Frame, config: GradAlignConfig, verl_config: DictConfig, findings: Findings) -> None:
    """Add findings on what cannot be known of the train files' problems. `frame` holds their rows."""
    if not config.is_forecast:
        return
    # A problem is its row in the train files; verl's data set adds raw_prompt to it.
    rows = {int(place): frame.row(int(place)) for place in frame.taken[:TRIED]}
    rows = {place: {**row, "raw_prompt": row[verl_config.data.prompt_key]} for place, row in rows.items()}
    for name in config.forecast.features:
        if ":" in name:
            with findings.refusals(AREA):
                OwnFeatures(name).try_out(rows)
                findings.add(AREA, "ok", f"gradalign.forecast.features: {name} gives numbers for {len(rows)} problems")
        elif name == "prompt":
            with findings.refusals(AREA, "gradalign.forecast.features=[source,text] asks nothing of the policy"):
                tokens = prompt_tokens(verl_config)
                longest = max(len(tokens(row["raw_prompt"])) for row in rows.values())
                text = (
                    f"gradalign.forecast.features: `prompt` asks the policy, which reads {longest} tokens of the first"
                )
                findings.add(AREA, "ok", text)
