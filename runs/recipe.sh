#!/usr/bin/env bash
# The best recipe of docs/tries.md on any base and data: three experts, their fusion aligned at four times the experts'
# learning rate with the gating loss, its scores beside theirs. It was chosen with 40 training questions per task, on
# questions held apart; the paper's own settings are runs/paper.sh.
#
#   bash runs/recipe.sh --base_model DIR --data_source DIR
#
# Run it again to resume it where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

. runs/rows.sh
SEEDS=42
take_flags "base_model=smollm2 data_source=sample num_samples=40 num_scored=200 batch_size=4 dtype=auto results_dir=results/recipe" "$@"
R="--results_dir $RESULTS_DIR"
TRAIN="--data_source $DATA_SOURCE --num_samples $NUM_SAMPLES --num_train_epochs 2 --batch_size $BATCH_SIZE --dtype $DTYPE $R"

for task in $TASKS; do python align_basemodel.py --moe_flag 0 --task_name $task --base_model $BASE_MODEL $TRAIN; done
python models/llama_moe.py $R
python align_basemodel.py --moe_flag 1 --learning_rate 2e-3 --router_learning_rate 0.01 --gate_loss_weight 0.3 $TRAIN

RUNS=raw,$(echo $TASKS | tr ' ' ','),mix_moe_reg_00000_00000_00000_gate_03000
python evaluator/evaluate_likelihood.py --run $RUNS --base_model $BASE_MODEL --data_source $DATA_SOURCE --num_samples $NUM_SCORED --dtype $DTYPE $R
python evaluator/report.py --runs $RUNS $R
