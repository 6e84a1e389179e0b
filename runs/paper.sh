#!/usr/bin/env bash
# The paper's settings on Llama-2-7B: one GPU of 24 GB or more, HF_TOKEN with the licence accepted.
# Not run by the authors of this repository, who had no access to Llama-2: see docs/reproduction.md.
set -euo pipefail
cd "$(dirname "$0")/.."

python align_basemodel.py --moe_flag 0 --task_name helpfulness
python align_basemodel.py --moe_flag 0 --task_name safety
python align_basemodel.py --moe_flag 0 --task_name truthfulness

(cd models && python llama_moe.py --save_dtype float16)

# The gating loss alone, then with the drift regulariser; the paper's average of the gating loss is over all tokens.
python align_basemodel.py --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01 --gate_tokens all --run_name mix_moe_reg_00000_00000_00000_gate_00100
python align_basemodel.py --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01 --helpfulness_weight 0.001 --safety_weight 0.001 --truthfulness_weight 0.001

for task in helpfulness safety truthfulness; do
    python inference.py --task_name $task --aligned_flag 0 --dataset_type test
    python inference.py --task_name $task --dataset_type test
    python inference.py --task_name $task --cross_task "mix_moe_reg_00000_00000_00000_gate_00100" --dataset_type test
    python inference.py --task_name $task --cross_task "mix_moe_reg_00010_00010_00010_gate_00100" --dataset_type test
done

python evaluator/evaluate_likelihood.py --run raw,helpfulness,safety,truthfulness,models/moe,mix_moe_reg_00000_00000_00000_gate_00100,mix_moe_reg_00010_00010_00010_gate_00100
python evaluator/report.py --runs raw,helpfulness,safety,truthfulness,models/moe,mix_moe_reg_00000_00000_00000_gate_00100,mix_moe_reg_00010_00010_00010_gate_00100
