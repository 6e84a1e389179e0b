#!/usr/bin/env bash
# Experts from elsewhere: aligned by others on most questions of their task, while whoever fuses knows few mixed ones.
# Fusion, one LoRA from the base, one that goes on from a merge (an adapter of the
# same size), a merge tuned on these questions: nats against their number.
#
#   bash runs/elsewhere.sh --data_source DIR [--seeds 42,43,44]
#
# For each number of mixed questions every method tries three numbers of epochs; which one counts is chosen on questions
# held apart (one seed, `--half held_apart`, the first run), then scored on the test half (`--half test --epochs CHOSEN`).
# Run it again to resume it where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE_MODEL=smollm2 DATA_SOURCE=sample NUM_EXPERT_SAMPLES=200 MIXED_QUESTIONS=10,40,160 NUM_HELD_APART=60 EPOCHS=2 BATCH_SIZE=4 DTYPE=auto
SEEDS=42 HALF_NAME=held_apart CHOSEN="" NUM_SCORED="" RESULTS=results/elsewhere SAVE="" REUSE=""
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || { echo "error: $1: needs a value" >&2; exit 2; }
    case $1 in
        --base_model) BASE_MODEL=$2 ;;
        --data_source) DATA_SOURCE=$2 ;;
        --num_expert_samples) NUM_EXPERT_SAMPLES=$2 ;;
        --mixed) MIXED_QUESTIONS=$2 ;;
        --num_held_apart) NUM_HELD_APART=$2 ;;
        --num_scored) NUM_SCORED=$2 ;;
        --num_train_epochs) EPOCHS=$2 ;;
        --batch_size) BATCH_SIZE=$2 ;;
        --dtype) DTYPE=$2 ;;
        --seeds) SEEDS=$2 ;;
        --half) HALF_NAME=$2 ;;
        --epochs) CHOSEN=$2 ;;
        --save) SAVE=$2 ;;
        --reuse) REUSE=$2 ;;
        --results_dir) RESULTS=$2 ;;
        *) echo "error: $1: is no flag of runs/elsewhere.sh; its head shows them" >&2; exit 2 ;;
    esac
    shift 2
done
refuse() { echo "error: $*" >&2; exit 2; }
case ,$SEEDS, in ,42,*) ;; *) refuse "--seeds $SEEDS: begin with 42, whose runs have no seed in their names" ;; esac
case $HALF_NAME:$CHOSEN in held_apart: | test:?*) ;; *) refuse "--half test takes --epochs, NAME=EPOCHS with commas; held_apart does not" ;; esac
TASKS="helpfulness safety truthfulness" DATA=$RESULTS/data
R="--results_dir $RESULTS" AT_ONCE=1 own_experts=""
if [ $HALF_NAME = held_apart ]; then
    HALF="--dataset_type held_apart"
    : "${NUM_SCORED:=-1}"
else
    HALF=""
    : "${NUM_SCORED:=200}"
fi
SCORE="--base_model $BASE_MODEL --data_source $DATA/experts $HALF --num_samples $NUM_SCORED --dtype $DTYPE"
. runs/rows.sh

python data/split.py --data_source $DATA_SOURCE --output $DATA --mixed $MIXED_QUESTIONS --num_held_apart $NUM_HELD_APART

if [ -n "$CHOSEN" ]; then  # every method's, and no other
    for number in $(echo "$MIXED_QUESTIONS" | tr ',' ' '); do
        for method in mixed merged fused; do case ",$CHOSEN," in *",${method}_$number="*) ;; *) refuse "--epochs $CHOSEN: says nothing of ${method}_$number" ;; esac; done
    done
    for one in $(echo "$CHOSEN" | tr ',' ' '); do
        case ",$MIXED_QUESTIONS," in *",$(echo ${one%=*} | sed 's/^[a-z]*_//'),"*) ;; *) refuse "--epochs $CHOSEN: $one is of no method here" ;; esac
    done
fi
LORA="python align_basemodel.py --moe_flag 0 --batch_size $BATCH_SIZE --dtype $DTYPE $R"
epochs_of() {  # NAME EPOCHS...: those that are tried, or the one that was chosen
    local name=$1 of_name
    shift
    if [ -z "$CHOSEN" ]; then echo "$@"; return; fi
    for of_name in $(echo "$CHOSEN" | tr ',' ' '); do
        if [ ${of_name%=*} = $name ]; then echo ${of_name#*=}; return; fi
    done
}
tries() {  # NAME NEEDS COMMAND...: a row for each number of epochs that is tried
    local name=$1 needs=$2 epochs
    shift 2
    for epochs in $(epochs_of $name $TRIED); do row ${name}_epochs_$epochs$s $needs "$@" --num_train_epochs $epochs --run_name ${name}_epochs_$epochs$s; done
}
expert() {  # TASK
    echo $LORA --task_name $1 --run_name $1$s --seed $seed --base_model $BASE_MODEL --data_source $DATA/experts \
        --num_samples $NUM_EXPERT_SAMPLES --num_train_epochs $EPOCHS
}
experts() { local task; for task in $TASKS; do once $task$s $(expert $task); done; }
fuse() { experts; once moe$s $FUSE; }
merge() { experts; once merge_tsv_m$s $TSV_M; }

for seed in $(echo "$SEEDS" | tr ',' ' '); do
    s=$([ $seed = 42 ] || echo _seed_$seed) own_experts="" of_seed=""
    for task in $TASKS; do
        own_experts=${own_experts:+$own_experts,}$task$s of_seed=${of_seed:+$of_seed,}$task=$task$s
    done
    FUSE="python models/llama_moe.py --experts $of_seed --seed $seed --output $RESULTS/outputs/moe$s $R"
    TSV_M="python models/merging.py --method tsv_m --experts $of_seed --output $RESULTS/outputs/merge_tsv_m$s $R"

    # no mixed question is needed
    for task in $TASKS; do row $task$s nothing $(expert $task); done
    row merge_linear$s experts python models/merging.py --method linear --experts $of_seed --output $RESULTS/outputs/merge_linear$s $R
    row merge_ties$s experts python models/merging.py --method ties --experts $of_seed --output $RESULTS/outputs/merge_ties$s $R
    row merge_tsv_m$s experts $TSV_M
    row ensemble_probabilities$s experts python models/ensemble.py --experts $of_seed --output $RESULTS/outputs/ensemble_probabilities$s $R

    for number in $(echo "$MIXED_QUESTIONS" | tr ',' ' '); do
        case $number in ? | ??) TRIED="2 4 8" ;; *) TRIED="1 2 4" ;; esac
        data="--data_source $DATA/mixed_$number"
        tries mixed_$number nothing $LORA --task_name mix --rank 24 --alpha 12 --seed $seed --base_model $BASE_MODEL $data
        tries merged_$number merge $LORA --task_name mix --init_adapter merge_tsv_m$s --rank 24 --alpha 24 --seed $seed --base_model $BASE_MODEL $data
        tries fused_$number fuse python align_basemodel.py --moe_flag 1 --gate_loss_weight 0.3 --router_learning_rate 0.01 \
            --moe_dir $RESULTS/outputs/moe$s --seed $seed --batch_size $BATCH_SIZE --dtype $DTYPE $data $R
        row tuned_$number$s experts python models/merging.py --method task_arithmetic --num_held_apart -1 $data --dtype $DTYPE \
            --experts $of_seed --output $RESULTS/outputs/tuned_$number$s $R
        row prototype_$number$s experts python models/llama_moe.py --router_init prototype --num_prompts $number $data --dtype $DTYPE \
            --experts $of_seed --seed $seed --output $RESULTS/outputs/prototype_$number$s $R
    done
done

python evaluator/report.py --runs $names --reference ensemble_probabilities ${REUSE:+--saved "$REUSE"} ${SAVE:+--save "$SAVE"} $HALF $R
