#!/usr/bin/env bash
# The whole method on the embedded SmolLM2-135M and data/sample, into results/demo.
# Minutes on two CPU cores. Run it again to resume it where it was interrupted.
#   bash runs/demo.sh BASE_MODEL RESULTS_DIR      on another base, into another folder
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -le 2 ] || { echo "error: $0 takes a base model and a results folder, no more: ${*:3}" >&2; exit 2; }
BASE_MODEL=${1:-smollm2}
RESULTS=${2:-results/demo}
R="--results_dir $RESULTS"
RUN=mix_moe_reg_00010_00010_00010_gate_03000

# 1. Three aligned experts
python align_basemodel.py --moe_flag 0 --task_name helpfulness --base_model $BASE_MODEL --data_source sample --num_samples 28 --num_train_epochs 2 --batch_size 4 $R
python align_basemodel.py --moe_flag 0 --task_name safety --base_model $BASE_MODEL --data_source sample --num_samples 28 --num_train_epochs 2 --batch_size 4 $R
python align_basemodel.py --moe_flag 0 --task_name truthfulness --base_model $BASE_MODEL --data_source sample --num_samples 28 --num_train_epochs 2 --batch_size 4 $R

# 2. Fused into one mixture of experts; its rivals: one LoRA on all the data, a merge, an ensemble
python models/llama_moe.py $R
python align_basemodel.py --moe_flag 0 --task_name mix --rank 24 --alpha 12 --learning_rate 2e-3 --run_name mixed --base_model $BASE_MODEL --data_source sample --num_samples 28 --num_train_epochs 2 --batch_size 4 $R
python models/merging.py --method ties $R
python models/ensemble.py --average probabilities $R

# 3. The fusion aligned, with gating loss and drift; its rates, and the LoRA's, were the best of docs/tries.md
python align_basemodel.py --moe_flag 1 --expert_topk 2 --learning_rate 2e-3 --router_learning_rate 0.01 --gate_loss_weight 0.3 --helpfulness_weight 0.001 --safety_weight 0.001 --truthfulness_weight 0.001 --num_samples 28 --num_train_epochs 2 --batch_size 4 $R

# 4. Its answers to all three tasks
python inference.py --task_name helpfulness --cross_task $RUN --dataset_type test --num_samples 8 --max_new_tokens 48 $R
python inference.py --task_name safety --cross_task $RUN --dataset_type test --num_samples 8 --max_new_tokens 48 $R
python inference.py --task_name truthfulness --cross_task $RUN --dataset_type test --num_samples 8 --max_new_tokens 48 $R

# 5. Scores that need no judge
RUNS=raw,helpfulness,safety,truthfulness,mixed,merge_ties,ensemble_probabilities,$RUN
python evaluator/evaluate_likelihood.py --run $RUNS --num_samples 24 $R

# 6. A small local judge, trained on the spot, and the answers' scores by it
python evaluator/train_judge.py --kind safety --base_model $BASE_MODEL --data_source sample --num_samples 120 --num_held_out 60 --num_train_epochs 2 --batch_size 8 --gradient_accumulation_steps 1 $R
python evaluator/evaluate_safety.py --task_name cross_$RUN --judge $RESULTS/judges/safety $R
python evaluator/evaluate_helpfulness.py --task_name cross_$RUN $R

# 7. One table of all of it, and the page: results/demo/report/index.html
python evaluator/report.py --runs $RUNS --data_source sample --show_answers $RESULTS $R
