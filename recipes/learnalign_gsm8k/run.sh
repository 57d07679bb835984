#!/usr/bin/env bash
# LearnAlign on GSM8K: warm-up on 300 problems, the pool scored once, 1,000 kept, Qwen2.5-1.5B-Instruct.
# Needs, time, figures and what to watch: README.md beside this file.
#
#   METHOD=learnalign SEED=0 NUM_GPUS=1 bash recipes/learnalign_gsm8k/run.sh [overrides ...]
#
# METHOD: a score of gradalign (configs/gradalign), random, or filter_groups (verl's own dynamic sampling).
set -xeuo pipefail

METHOD=${METHOD:-learnalign}
SEED=${SEED:-0}
NUM_GPUS=${NUM_GPUS:-1}
DATA_DIR=${DATA_DIR:-outputs/data/learnalign_gsm8k}
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
PYTHON=${PYTHON:-python}

case "$METHOD" in
    filter_groups)
        SELECTION=(algorithm.filter_groups.enable=true algorithm.filter_groups.metric=reward)
        PLAN=()
        ;;
    random)
        # 1,000 problems drawn at once, as data.seed says; data.train_max_samples=-1 trains on all.
        SELECTION=(+gradalign=random)
        PLAN=(gradalign.seed="$SEED" gradalign.schedule=step data.train_max_samples=1000)
        ;;
    *)
        # Scores without a trusted set (learnalign, norm, accuracy_greedy) do not read its file.
        SELECTION=(+gradalign="$METHOD")
        PLAN=(
            gradalign.seed="$SEED"
            gradalign.validation.files="$DATA_DIR/trusted.parquet"
            # Tokens of a micro-batch when scoring: 8 responses of 1,536, the longest there are.
            gradalign.probe.max_tokens_per_rank=16384
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
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=32768
    # The entropy of 32768 tokens at once would take 20 GB more.
    actor_rollout_ref.actor.entropy_from_logits_with_chunking=true
    actor_rollout_ref.actor.fsdp_config.param_offload=false
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=false
)

ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    # 3 GB of weights fit on one GPU: one replica on each is the quickest.
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5
    actor_rollout_ref.rollout.max_num_seqs=512
    actor_rollout_ref.rollout.seed="$SEED"
)

TRAINER=(
    trainer.logger='["console","wandb"]'
    trainer.project_name=verl-gradalign
    trainer.experiment_name="learnalign_gsm8k-$METHOD-seed$SEED"
    trainer.default_local_dir="outputs/learnalign_gsm8k/$METHOD-seed$SEED"
    trainer.n_gpus_per_node="$NUM_GPUS"
    trainer.nnodes=1
)

# The regime stands behind +gradalign=..., whose defaults it changes.
"$PYTHON" -m verl.trainer.main_ppo \
    "${SELECTION[@]}" \
    +regime=learnalign_gsm8k \
    "${PLAN[@]}" \
    "${DATA[@]}" \
    "${ACTOR[@]}" \
    "${ROLLOUT[@]}" \
    "${TRAINER[@]}" \
    "$@"
