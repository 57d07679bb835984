# SPDX-License-Identifier: Apache-2.0
"""Writes what verl's trainer leaves of an actor, by verl's own code: `python -m tests.e2e.shards MODEL OUTPUT`.

The policy is the model's, slightly moved, as if it had been trained. It goes to OUTPUT/policy as a whole, and to
OUTPUT/global_step_7/actor as the one shard of one rank.
"""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

# Small enough for a policy that still solves problems, large enough to be told from the model's.
MOVE = 0.02


def main(model_folder, output):
    torch.distributed.init_process_group("gloo", init_method=f"file://{output / 'rendezvous'}", rank=0, world_size=1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += MOVE * parameter.std(unbiased=False) * torch.randn_like(parameter)
    model.save_pretrained(output / "policy")
    tokenizer.save_pretrained(output / "policy")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",)))
    contents = OmegaConf.create({"save_contents": ["model"], "load_contents": ["model"]})
    manager = FSDPCheckpointManager(model, processing_class=tokenizer, checkpoint_config=contents)
    manager.save_checkpoint(str(output / "global_step_7" / "actor"), global_step=7)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
