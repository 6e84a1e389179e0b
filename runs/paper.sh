#!/usr/bin/env bash
# The paper's settings on Llama-2-7B: one GPU of 24 GB or more, HF_TOKEN with the licence accepted.
# Not run by the authors of this repository, who had no access to Llama-2: see docs/reproduction.md.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 0 ] || { echo "error: $0 takes no arguments: $*" >&2; exit 2; }

python align_basemodel.py --gradient_checkpointing 1 --moe_flag 0 --task_name helpfulness
python align_basemodel.py --gradient_checkpointing 1 --moe_flag 0 --task_name safety
python align_basemodel.py --gradient_checkpointing 1 --moe_flag 0 --task_name truthfulness

(cd models && python llama_moe.py --save_dtype float16)

# The gating loss alone, as the paper has it: the mean over all samples and tokens. Then ours, with the drift regulariser.
python align_basemodel.py --gradient_checkpointing 1 --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01 --gate_tokens all --gate_balance sample
python align_basemodel.py --gradient_checkpointing 1 --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01 --helpfulness_weight 0.001 --safety_weight 0.001 --truthfulness_weight 0.001

for task in helpfulness safety truthfulness xstest; do
    python inference.py --task_name $task --aligned_flag 0 --dataset_type test
    python inference.py --task_name $task --dataset_type test
    python inference.py --task_name $task --cross_task "mix_moe_reg_00000_00000_00000_gate_00100_gate_tokens_all_gate_balance_sample" --dataset_type test
    python inference.py --task_name $task --cross_task "mix_moe_reg_00010_00010_00010_gate_00100" --dataset_type test
done

# The paper's scores by its judges (helpfulness needs OPENAI_API_KEY, and costs money: --dry_run 1 says how much)
for answers in raw aligned cross_mix_moe_reg_00000_00000_00000_gate_00100_gate_tokens_all_gate_balance_sample cross_mix_moe_reg_00010_00010_00010_gate_00100; do
    python evaluator/evaluate_helpfulness.py --task_name $answers --judge alpaca_eval_gpt4
    python evaluator/evaluate_safety.py --task_name $answers
    python evaluator/evaluate_truth_and_info.py --task_name $answers --mode 0
    python evaluator/evaluate_truth_and_info.py --task_name $answers --mode 1
done

python evaluator/evaluate_likelihood.py --run raw,helpfulness,safety,truthfulness,moe,mix_moe_reg_00000_00000_00000_gate_00100_gate_tokens_all_gate_balance_sample,mix_moe_reg_00010_00010_00010_gate_00100
python evaluator/report.py --runs raw,helpfulness,safety,truthfulness,moe,mix_moe_reg_00000_00000_00000_gate_00100_gate_tokens_all_gate_balance_sample,mix_moe_reg_00010_00010_00010_gate_00100
