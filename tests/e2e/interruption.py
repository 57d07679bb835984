# SPDX-License-Identifier: Apache-2.0
"""Imported by every process of a run (VERL_USE_EXTERNAL_MODULES): stops the run at one moment, for the test to kill it.

INTERRUPT_AT is `<phase> <number> <marker file>`. At the phase's moment the marker is written and the process waits; the
test sees the marker and kills everything with SIGKILL. Phases: `rollout` and `checkpoint` of a training step,
`scoring` and `update` by the number of the call since the run was started.
"""

import os
import time
from pathlib import Path

import wrapt

PHASE, NUMBER, MARKER = (*os.environ.get("INTERRUPT_AT", "").split(), "", "", "")[:3]
calls = 0


def wait_for_the_end():
    Path(MARKER).touch()
    time.sleep(3600)


def in_rollout(wrapped, _, args, kwargs):
    """The step's prompts are being answered when the trainer begins to wait for them."""
    if kwargs["partition_id"] == "train" and kwargs["global_steps"] == int(NUMBER):
        wait_for_the_end()
    return wrapped(*args, **kwargs)


def in_scoring(wrapped, _, args, kwargs):
    """The direction is made, the candidates are scored, and nothing has been returned."""
    global calls
    result, calls = wrapped(*args, **kwargs), calls + 1
    if calls == int(NUMBER):
        wait_for_the_end()
    return result


def in_checkpoint(wrapped, _, args, kwargs):
    """The selection's state and the actor are written, the data loader's state and the tracker file are not."""
    if os.path.basename(str(args[0])) == f"global_step_{NUMBER}":
        wait_for_the_end()
    return wrapped(*args, **kwargs)


MOMENTS = {
    "rollout": ("verl_gradalign.integration.sampler", "GradAlignSampler.sample", in_rollout),
    "scoring": ("verl_gradalign.probe.call", "_scores", in_scoring),
    "update": ("verl_gradalign.integration.worker", "GradAlignWorker.update_actor", in_scoring),
    "checkpoint": ("verl.utils.fs", "local_mkdir_safe", in_checkpoint),
}
if PHASE:
    module, name, wrapper = MOMENTS[PHASE]
    wrapt.register_post_import_hook(lambda imported: wrapt.wrap_function_wrapper(imported, name, wrapper), module)
