# SPDX-License-Identifier: Apache-2.0
"""Imported by every process of a run (VERL_USE_EXTERNAL_MODULES): writes down what the rollout and the actor said.

Every trained row becomes a line of OBSERVED_ROWS: the step, the token ids, and for each token of the response the
log-probability that the rollout drew it with and the one that the actor gives it before the update.
"""

import json
import os

import transfer_queue as tq
import wrapt

FIELDS = {
    "prompt": "prompts",
    "response": "responses",
    "rollout": "rollout_log_probs",
    "actor": "old_log_probs",
}


def write_rows(wrapped, trainer, args, kwargs):
    batch = wrapped(*args, **kwargs)
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(FIELDS.values()))
    columns = [[row.tolist() for row in data[field].unbind()] for field in FIELDS.values()]
    with open(os.environ["OBSERVED_ROWS"], "a", encoding="utf-8") as file:
        for values in zip(*columns, strict=True):
            row = dict(zip(FIELDS, values, strict=True))
            file.write(json.dumps({"step": trainer.global_steps, **row}) + "\n")
    return batch


def attach(module):
    wrapt.wrap_function_wrapper(module, "PPOTrainer._compute_old_log_prob", write_rows)


wrapt.register_post_import_hook(attach, "verl.trainer.ppo.v1.trainer_base")
