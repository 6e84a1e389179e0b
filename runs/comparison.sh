#!/usr/bin/env bash
# The paper's comparison: experts, their fusion, and its rivals, by the project's own commands, into one report.
#
#   bash runs/comparison.sh --base_model smollm2 --data_source DIR --num_samples 160 --seeds 42,43,44
#   bash runs/comparison.sh --quick 1        all kinds of row on smollm2 and data/sample, few rows, one seed: minutes
#
# Run it again to resume it where it was stopped: what is done says so and is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE_MODEL=smollm2 DATA_SOURCE=sample NUM_SAMPLES=160 NUM_SCORED=200 NUM_ANSWERED=100 SEEDS=42 EPOCHS=2 BATCH_SIZE=4
ABLATIONS=1 QUICK=0 RESULTS=results/comparison HELD_APART=30 DTYPE=auto
while [ $# -gt 0 ]; do
    case $1 in
        --base_model) BASE_MODEL=$2 ;;
        --data_source) DATA_SOURCE=$2 ;;
        --num_samples) NUM_SAMPLES=$2 ;;
        --num_scored) NUM_SCORED=$2 ;;
        --num_answered) NUM_ANSWERED=$2 ;;
        --num_train_epochs) EPOCHS=$2 ;;
        --batch_size) BATCH_SIZE=$2 ;;
        --num_held_apart) HELD_APART=$2 ;;
        --seeds) SEEDS=$2 ;;
        --dtype) DTYPE=$2 ;;
        --ablations) ABLATIONS=$2 ;;
        --quick) QUICK=$2 ;;
        --results_dir) RESULTS=$2 ;;
        *) echo "error: $1: is no flag of runs/comparison.sh; its head shows them" >&2; exit 2 ;;
    esac
    [ $# -ge 2 ] || { echo "error: $1: needs a value" >&2; exit 2; }
    shift 2
done
case ,$SEEDS, in
    ,42,*) ;;
    *) echo "error: --seeds $SEEDS: begin with 42, whose runs have no seed in their names" >&2; exit 2 ;;
esac
MERGES="linear task_arithmetic ties dare_ties della sce model_stock tsv_m iso_c knots_ties"
TUNED="task_arithmetic ties tsv_m"
NEW_TOKENS=128
if [ "$QUICK" = 1 ]; then
    NUM_SAMPLES=12 NUM_SCORED=8 NUM_ANSWERED=2 EPOCHS=1 ABLATIONS=0 NEW_TOKENS=16
    MERGES="linear task_arithmetic ties tsv_m iso_c knots_ties" TUNED=""
fi
TASKS="helpfulness safety truthfulness"
R="--results_dir $RESULTS"
TRAIN="--data_source $DATA_SOURCE --num_samples $NUM_SAMPLES --num_train_epochs $EPOCHS --batch_size $BATCH_SIZE --dtype $DTYPE $R"
FUSION="--moe_flag 1 --gate_loss_weight 0.3 --router_learning_rate 0.01 $TRAIN"
RUN=mix_moe_reg_00000_00000_00000_gate_03000

num_seeds=$(echo "$SEEDS" | tr ',' '\n' | wc -l)
echo "The comparison on $BASE_MODEL and $DATA_SOURCE, $NUM_SAMPLES rows per task, seeds $SEEDS, into $RESULTS:"
echo "  $((3 * num_seeds)) experts, $((3 * num_seeds)) LoRAs on the mixed data, $num_seeds fusions$([ "$ABLATIONS" = 1 ] && echo " and 19 ablations of one")"
echo "  $(echo $MERGES | wc -w) merges, $(echo $TUNED | wc -w) of them tuned too, 2 averaging ensembles, 3 that select"
echo "  likelihoods of $NUM_SCORED held-out rows per task and run, answers to $NUM_ANSWERED prompts per task"
if [ "$QUICK" = 1 ]; then
    echo "On two CPU cores: about ten minutes."
else
    echo "On two CPU cores with SmolLM2-135M and 160 rows per task: 1 h for the first seed's main rows, as much for the"
    echo "merges and answers, half an hour for each further seed's rows, 5 h for the ablations."
fi

names=raw
chat() { python -c "import sys; from models.base import load_tokenizer; sys.exit(load_tokenizer(sys.argv[1]).chat_template is None)" "$BASE_MODEL"; }
if chat; then names=raw,raw_chat; fi
add() { names=$names,$1; }

# 1. Experts, one LoRA on the mixed data, and the fusion, for each seed
for seed in $(echo "$SEEDS" | tr ',' ' '); do
    s=$([ "$seed" = 42 ] || echo "_seed_$seed")
    experts=""
    for task in $TASKS; do
        python align_basemodel.py --moe_flag 0 --task_name $task --run_name $task$s --seed $seed --base_model $BASE_MODEL $TRAIN
        experts=$experts,$task=$task$s
    done
    experts=${experts#,}
    mixed="--moe_flag 0 --task_name mix --seed $seed --base_model $BASE_MODEL $TRAIN"
    python align_basemodel.py $mixed --rank 24 --alpha 12 --run_name mixed_rank_24$s
    if [ "$QUICK" = 0 ]; then
        python align_basemodel.py $mixed --run_name mixed_rank_8$s
        python align_basemodel.py $mixed --rank 24 --alpha 12 --num_train_epochs $((2 * EPOCHS)) --run_name mixed_rank_24_twice$s
        python models/merging.py --method linear --experts $experts --output $RESULTS/outputs/merge_linear$s $R
        python models/merging.py --method ties --experts $experts --output $RESULTS/outputs/merge_ties$s $R
        python models/ensemble.py --experts $experts --output $RESULTS/outputs/ensemble_probabilities$s $R
    fi
    python models/llama_moe.py --experts $experts --seed $seed --output $RESULTS/outputs/moe$s $R
    python align_basemodel.py $FUSION --seed $seed --moe_dir $RESULTS/outputs/moe$s
    for name in $TASKS mixed_rank_24; do add $name$s; done
    if [ "$QUICK" = 0 ]; then
        for name in mixed_rank_8 mixed_rank_24_twice merge_linear merge_ties ensemble_probabilities; do add $name$s; done
    fi
    add moe$s; add $RUN$s
done

# 2. Merges and ensembles of the first seed's experts
for method in $MERGES; do
    python models/merging.py --method $method $R
    case ,$names, in *,merge_$method,*) ;; *) add merge_$method ;; esac
done
for method in $TUNED; do
    python models/merging.py --method $method --num_held_apart $HELD_APART --dtype $DTYPE $R
    add merge_${method}_tuned
done
for average in probabilities log_probabilities; do
    python models/ensemble.py --average $average $R
    case ,$names, in *,ensemble_$average,*) ;; *) add ensemble_$average ;; esac
done

# 3. Fusions that differ in one thing
if [ "$ABLATIONS" = 1 ]; then
    ablation() { local name=$1; shift; python align_basemodel.py $FUSION --run_name $name "$@"; add $name; }
    python models/llama_moe.py --fresh_rank 8 --base_model $BASE_MODEL --output $RESULTS/outputs/moe_fresh $R
    python models/llama_moe.py --router_init prototype --output $RESULTS/outputs/moe_prototype $R
    add moe_prototype
    ablation fused_fresh_experts --moe_dir $RESULTS/outputs/moe_fresh --base_model $BASE_MODEL
    ablation fused_prototype --moe_dir $RESULTS/outputs/moe_prototype
    python align_basemodel.py --moe_flag 1 --gate_loss_weight 0.3 $TRAIN --train_router 0 --run_name fused_router_frozen
    add fused_router_frozen
    ablation fused_router_alone --train_experts 0
    ablation fused_attention --tune_attention 1
    for k in 1 3; do ablation fused_top_$k --expert_topk $k; done
    for gate in 0 0.01 0.1 1; do ablation fused_gate_$gate --gate_loss_weight $gate; done
    for gamma in 0.0001 0.001 0.01 0.1 1; do
        ablation fused_gamma_$gamma --helpfulness_weight $gamma --safety_weight $gamma --truthfulness_weight $gamma
        ablation fused_gamma_1_$gamma --helpfulness_weight $gamma
    done
fi

# 4. Scores that need no judge
python evaluator/evaluate_likelihood.py --run $names --num_samples $NUM_SCORED --dtype $DTYPE $R

# 5. Answers, ensembles that select among them, and small judges' scores of all of them
ANSWER="--num_samples $NUM_ANSWERED --max_new_tokens $NEW_TOKENS --dtype $DTYPE $R"
answered=$([ "$QUICK" = 1 ] && echo safety || echo "$TASKS")
for task in $answered; do
    python inference.py --task_name $task --aligned_flag 0 $ANSWER
    for run in $TASKS mixed_rank_24 merge_linear ensemble_probabilities $RUN; do
        python inference.py --task_name $task --cross_task $run $ANSWER
    done
    select="python evaluator/select_answers.py --task_name $task --answers cross_helpfulness,cross_safety,cross_truthfulness $R"
    $select
    $select --by classifier --data_source $DATA_SOURCE --num_samples $NUM_SAMPLES
done
add consensus; add classifier
JUDGE="--base_model $BASE_MODEL --data_source $DATA_SOURCE --dtype $DTYPE $R"
if [ "$QUICK" = 1 ]; then
    python evaluator/train_judge.py --kind safety --num_samples 40 --num_held_out 40 $JUDGE
else
    for kind in safety truth information; do python evaluator/train_judge.py --kind $kind $JUDGE; done
fi
for answers in raw cross_helpfulness cross_safety cross_truthfulness cross_mixed_rank_24 cross_merge_linear \
    cross_ensemble_probabilities cross_$RUN consensus classifier; do
    python evaluator/evaluate_safety.py --task_name $answers --judge $RESULTS/judges/safety --dtype $DTYPE $R
    if [ "$QUICK" = 0 ]; then
        python evaluator/evaluate_truth_and_info.py --task_name $answers --mode 0 --judge $RESULTS/judges/truth --dtype $DTYPE $R
        python evaluator/evaluate_truth_and_info.py --task_name $answers --mode 1 --judge $RESULTS/judges/information --dtype $DTYPE $R
    fi
done

# 6. The report
python evaluator/report.py --runs $names --reference $RUN --texts $([ "$DATA_SOURCE" = sample ] && echo 1 || echo 0) $R
