#!/usr/bin/env bash
# One training run of the demonstration: stock verl on the CPU, plus one word.
#
#   recipes/quickstart/train.sh RUN_DIR DATA_DIR MODEL_DIR SCORE [overrides ...]
#
# SCORE is a file name of configs/gradalign (cosine, dot, random). RUN_DIR receives metrics.jsonl and gradalign/.
set -euo pipefail

run_dir=$1 data_dir=$2 model_dir=$3 score=$4
shift 4
num_ranks=${NUM_RANKS:-1}

export VERL_PLATFORM=cpu
export VERL_FILE_LOGGER_PATH="$run_dir/metrics.jsonl"
# One training rank per core leaves no core idle; waiting threads must not burn what the others compute on.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + num_ranks - 1) / num_ranks ))}
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
# TransferQueue asks for 8 threads per message, and says in the log for every message that there are fewer cores.
export TQ_NUM_THREADS=1

exec "${PYTHON:-python}" -m verl.trainer.main_ppo \
    +platform=cpu \
    +regime=quickstart \
    +gradalign="$score" \
    gradalign.validation.files="$data_dir/trusted.parquet" \
    gradalign.poll_interval_s=0.02 \
    gradalign.oversample=3 \
    data.train_files="$data_dir/pool.parquet" \
    data.val_files="$data_dir/test.parquet" \
    actor_rollout_ref.model.path="$model_dir" \
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_gradalign.cpu.batched_rollout.BatchedRollout \
    reward.num_workers=0 \
    trainer.n_gpus_per_node="$num_ranks" \
    trainer.default_local_dir="$run_dir" \
    hydra.run.dir="$run_dir/hydra" \
    "$@"
