#!/usr/bin/env bash
# A corpus of low utility: WebInstruct-verified's first 40,000 rows, Qwen3-8B-Base.
# Needs, time, figures and what to watch: README.md beside this file.
#
#   METHOD=cosine SEED=0 NUM_GPUS=8 bash recipes/low_utility/run.sh [overrides ...]
#
# METHOD: a score of gradalign (configs/gradalign), random, or filter_groups (verl's own dynamic sampling).
set -xeuo pipefail

METHOD=${METHOD:-cosine}
SEED=${SEED:-0}
NUM_GPUS=${NUM_GPUS:-8}
DATA_DIR=${DATA_DIR:-outputs/data/low_utility}
MODEL=${MODEL:-Qwen/Qwen3-8B-Base}
# Above 0: adapters of this rank instead of all parameters.
LORA_RANK=${LORA_RANK:-0}
PYTHON=${PYTHON:-python}

# Eight GPUs hold parameters and optimizer beside vLLM. Fewer keep them in CPU memory while vLLM generates.
OFFLOAD=true
if [ "$NUM_GPUS" -ge 8 ]; then OFFLOAD=false; fi
if [ "$NUM_GPUS" -lt 4 ] && [ "$LORA_RANK" -eq 0 ] && [ "$MODEL" = Qwen/Qwen3-8B-Base ]; then
    echo "Full training of 8B parameters needs four 80 GB GPUs. Set LORA_RANK=64 or a smaller MODEL (README)." >&2
fi

case "$METHOD" in
    filter_groups)
        SELECTION=(algorithm.filter_groups.enable=true algorithm.filter_groups.metric=reward)
        PLAN=()
        ;;
    random)
        # What a round keeps is drawn at once: no other candidates are rolled out. 5 epochs of 256 are 10 steps.
        SELECTION=(+gradalign=random)
        PLAN=(gradalign.seed="$SEED" gradalign.curriculum.num_candidates=256 gradalign.curriculum.keep=1.0)
        ;;
    *)
        SELECTION=(+gradalign="$METHOD")
        PLAN=(
            gradalign.seed="$SEED"
            gradalign.validation.files="$DATA_DIR/trusted.parquet"
            # Tokens of a micro-batch when scoring: 16 responses of 2,000, prompts included.
            gradalign.probe.max_tokens_per_rank=32768
        )
        ;;
esac

DATA=(
    data.train_files="$DATA_DIR/train.parquet"
    data.val_files="$DATA_DIR/test.parquet"
    data.filter_overlong_prompts_workers=8
    data.seed="$SEED"
)

ACTOR=(
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.model.use_remove_padding=true
    +actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2
    actor_rollout_ref.model.enable_gradient_checkpointing=true
    actor_rollout_ref.actor.strategy=fsdp2
    # Tokens of a micro-batch: with gradients, and without.
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=32768
    # The entropy of 32768 tokens at once would take 20 GB more.
    actor_rollout_ref.actor.entropy_from_logits_with_chunking=true
    actor_rollout_ref.actor.fsdp_config.param_offload="$OFFLOAD"
    actor_rollout_ref.actor.fsdp_config.optimizer_offload="$OFFLOAD"
)

LORA=()
if [ "$LORA_RANK" -gt 0 ]; then
    LORA=(
        actor_rollout_ref.model.lora_rank="$LORA_RANK"
        actor_rollout_ref.model.lora_alpha="$LORA_RANK"
        # vLLM reads the frozen weights itself; only adapters are pushed.
        actor_rollout_ref.rollout.load_format=safetensors
        # Adapters start at zero and learn slower than all parameters would.
        actor_rollout_ref.actor.optim.lr=1e-5
    )
fi

ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    # 16 GB of weights fit on one GPU; with 40 GB of memory set 2.
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.7
    actor_rollout_ref.rollout.max_num_seqs=512
    actor_rollout_ref.rollout.seed="$SEED"
)

TRAINER=(
    trainer.logger='["console","wandb"]'
    trainer.project_name=verl-gradalign
    trainer.experiment_name="low_utility-$METHOD-seed$SEED"
    trainer.default_local_dir="outputs/low_utility/$METHOD-seed$SEED"
    trainer.n_gpus_per_node="$NUM_GPUS"
    trainer.nnodes=1
)

# The regime stands behind +gradalign=..., whose defaults it changes.
"$PYTHON" -m verl.trainer.main_ppo \
    "${SELECTION[@]}" \
    +regime=low_utility \
    "${PLAN[@]}" \
    "${DATA[@]}" \
    "${ACTOR[@]}" \
    "${LORA[@]}" \
    "${ROLLOUT[@]}" \
    "${TRAINER[@]}" \
    "$@"
