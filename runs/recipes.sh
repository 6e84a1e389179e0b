#!/usr/bin/env bash
# Does the fusion beat one LoRA of its size on the same rows, with as many optimiser steps in all, if both are tuned?
#
#   bash runs/recipes.sh --data_source DIR                     every try, one seed, scored on training questions held apart
#   bash runs/recipes.sh --data_source DIR --half test --seeds 42,43,44 --rows mixed,fused       what was chosen, confirmed
#
# Run it again to resume it where it was stopped. --save DIR keeps each row there as soon as it is scored; --reuse DIR
# takes over the rows of such a folder whose settings are these.
set -euo pipefail
cd "$(dirname "$0")/.."

. runs/rows.sh
take_flags "base_model=smollm2 data_source=sample num_samples=160 num_scored= num_train_epochs=2 batch_size=4 dtype=auto
    seeds=42 half=held_apart rows= reference=mixed save= reuse= results_dir=results/recipes" "$@"
case $HALF in held_apart | test) ;; *) refuse "--half $HALF: is held_apart or test" ;; esac
case $HALF:$SEEDS in held_apart:*,*) refuse "--seeds $SEEDS: on questions held apart one seed; another draws others" ;; esac
case $NUM_TRAIN_EPOCHS in 1 | *[!0-9]*) refuse "--num_train_epochs $NUM_TRAIN_EPOCHS: is a whole number of 2 or more here" ;; esac
R="--results_dir $RESULTS_DIR" AT_ONCE=1 own_experts=""
if [ $HALF = held_apart ]; then
    HALF="--dataset_type held_apart" SCORED_ON="--dataset_type held_apart --num_trained $NUM_SAMPLES"
    : "${NUM_SCORED:=100}"
else
    HALF="" SCORED_ON="--comparisons 0"
    : "${NUM_SCORED:=200}"
fi
SCORE="--base_model $BASE_MODEL --data_source $DATA_SOURCE $SCORED_ON --num_samples $NUM_SCORED --dtype $DTYPE"
TRAIN="--data_source $DATA_SOURCE --num_samples $NUM_SAMPLES --num_train_epochs $NUM_TRAIN_EPOCHS --batch_size $BATCH_SIZE --dtype $DTYPE $R"

LISTING=1 all_names=""
wanted() {
    if [ $LISTING = 1 ]; then all_names=$all_names,$1; return 1; fi
    case ",$ROWS," in ,, | *",$1,"*) ;; *) return 1 ;; esac
}
mixed() {  # NAME [FLAG...]: one LoRA on all tasks' rows
    local name=$1
    shift
    if wanted $name; then row $name$s nothing $MIXED --run_name $name$s "$@"; fi
}
experts_are() {  # SUFFIX, or one for each task: what is fused from here on, experts whose names end so
    suffixes=("$@") together=$1 own_experts="" named_experts=""
    [ $# = 3 ] && together=_each_its_own || suffixes=("$1" "$1" "$1")
    for task in $TASKS; do
        own_experts=${own_experts:+$own_experts,}$(expert_of $task) named_experts=${named_experts:+$named_experts,}$task=$(expert_of $task)
    done
    router_starts random
}
router_starts() {  # random, prototype or arrow: how their routers start; by_prompt: and choose once for each prompt
    moe=moe$together$s start="--seed $seed"
    if [ $1 != random ]; then moe=${moe}_$1 start="$start --router_init $1 --dtype $DTYPE $([ $NUM_SAMPLES = -1 ] || echo --num_trained $NUM_SAMPLES)"; fi
    if [ "${2:-}" = by_prompt ]; then moe=${moe}_by_prompt start="$start --routing prompt"; fi
}
suffix_of() {  # TASK
    case $1 in helpfulness) echo "${suffixes[0]}" ;; safety) echo "${suffixes[1]}" ;; *) echo "${suffixes[2]}" ;; esac
}
expert_of() { echo $1$(suffix_of $1)$s; }  # TASK
flags_of() {  # SUFFIX: how an expert of this name is aligned
    case $1 in
        _1_epoch) echo --num_train_epochs $((NUM_TRAIN_EPOCHS - 1)) ;;
        _rate_2e-3) echo --learning_rate 2e-3 ;;
        _rank_16) echo --rank 16 --alpha 8 ;;
    esac
}
expert() {  # TASK
    echo python align_basemodel.py --moe_flag 0 --task_name $1 --run_name $(expert_of $1) --seed $seed --base_model $BASE_MODEL $TRAIN $(flags_of "$(suffix_of $1)")
}
experts() {  # also as rows: what is reused must be of these
    local task name
    for task in $TASKS; do
        name=$(expert_of $task)
        case ",$names," in *",$name,"*) continue ;; esac
        row $name nothing $(expert $task)
    done
}
fuse() {
    local task
    for task in $TASKS; do once $(expert_of $task) $(expert $task); done
    once $moe python models/llama_moe.py --experts $named_experts --output $RESULTS_DIR/outputs/$moe $start $R
}
fusion() {  # NAME [FLAG...]: their fusion, aligned
    local name=$1
    shift
    wanted $name || return 0
    experts
    row $name$s fuse $FUSED --moe_dir $RESULTS_DIR/outputs/$moe --run_name $name$s "$@"
}

all_tries() {  # of $seed
    s=$([ $seed = 42 ] || echo _seed_$seed)
    MIXED="python align_basemodel.py --moe_flag 0 --task_name mix --rank 24 --alpha 12 --seed $seed --base_model $BASE_MODEL $TRAIN"
    FUSED="python align_basemodel.py --moe_flag 1 --gate_loss_weight 0.3 --router_learning_rate 0.01 --seed $seed $TRAIN"

    # 1. One LoRA with the fused model's parameters: its rate and epochs; at the best rate its dropout and rank
    mixed mixed
    for rate in 1e-3 2e-3 4e-3; do mixed mixed_rate_$rate --learning_rate $rate; done
    mixed mixed_3_epochs --num_train_epochs $((NUM_TRAIN_EPOCHS + 1))
    mixed mixed_3_epochs_rate_1e-3 --num_train_epochs $((NUM_TRAIN_EPOCHS + 1)) --learning_rate 1e-3
    mixed mixed_twice --num_train_epochs $((2 * NUM_TRAIN_EPOCHS))  # the steps of experts and fusion together
    best="--learning_rate 2e-3"
    mixed mixed_rate_2e-3_1_epoch $best --num_train_epochs $((NUM_TRAIN_EPOCHS - 1))
    for dropout in 0 0.3; do mixed mixed_rate_2e-3_dropout_$dropout $best --lora_dropout $dropout; done
    mixed mixed_rate_2e-3_rank_48 $best --rank 48 --alpha 24

    # 2. The fusion of experts with half of the steps: its rate, dropout and top-k; by prompt
    experts_are ""
    fusion fused
    for rate in 2e-4 1e-3 2e-3 4e-3; do fusion fused_rate_$rate --learning_rate $rate; done
    fusion fused_dropout_0.3 --expert_dropout 0.3
    fusion fused_top_3_then_2 --expert_topk 3 --answer_topk 2
    drift="--helpfulness_weight 0.001 --safety_weight 0.001 --truthfulness_weight 0.001"
    fusion fused_gate_1_gamma_0.001 --gate_loss_weight 1 --router_learning_rate 0.1 $drift
    router_starts prototype by_prompt
    fusion fused_prototype_by_prompt_rate_1e-3 --learning_rate 1e-3

    # 3. Other shares of the steps
    experts_are _1_epoch
    fusion fused_1_then_2 --expert_dropout 0.1
    fusion fused_1_then_3 --num_train_epochs $((NUM_TRAIN_EPOCHS + 1)) --expert_dropout 0.1
    experts_are ""
    fusion fused_2_then_3 --num_train_epochs $((NUM_TRAIN_EPOCHS + 1)) --expert_dropout 0.1
    fusion fused_2_then_3_rate_1e-3 --num_train_epochs $((NUM_TRAIN_EPOCHS + 1)) --expert_dropout 0.1 --learning_rate 1e-3
    experts_are "" "" _1_epoch  # fewer for the task with the most rows
    fusion fused_each_its_own_then_3 --num_train_epochs $((NUM_TRAIN_EPOCHS + 1)) --expert_dropout 0.1

    # 4. At the best rate: the experts too; how the routers start and learn; drift; dropout; three experts per token
    experts_are _rate_2e-3
    fusion fused_all_at_2e-3 $best
    experts_are ""
    for by in prototype arrow; do router_starts $by; fusion fused_rate_2e-3_$by $best; done
    router_starts random
    fusion fused_rate_2e-3_router_rate_0.1 $best --router_learning_rate 0.1
    fusion fused_rate_2e-3_gate_falls $best --gate_schedule linear
    fusion fused_rate_2e-3_no_gate $best --gate_loss_weight 0
    for gamma in 0.001 0.1; do
        drift="--helpfulness_weight $gamma --safety_weight $gamma --truthfulness_weight $gamma"
        fusion fused_rate_2e-3_gamma_$gamma $best $drift
    done
    fusion fused_rate_2e-3_dropout_0.1 $best --expert_dropout 0.1
    fusion fused_rate_2e-3_top_3 $best --expert_topk 3

    # 5. Twice the rank
    experts_are _rank_16
    fusion fused_rate_2e-3_rank_16 $best
}

seed=42
all_tries  # their names alone, to know a misspelt one before hours are spent
for name in $(echo "$ROWS,$REFERENCE" | tr ',' ' '); do
    case "$all_names," in *",$name,"*) ;; *) refuse "$name: is no row of runs/recipes.sh" ;; esac
done
case ",$ROWS," in ,, | *",$REFERENCE,"*) ;; *) refuse "--reference $REFERENCE: is none of --rows $ROWS" ;; esac
LISTING=0
for seed in $(echo "$SEEDS" | tr ',' ' '); do all_tries; done

# The table
python evaluator/report.py --runs $names --reference $REFERENCE ${REUSE:+--saved "$REUSE"} ${SAVE:+--save "$SAVE"} $HALF $R
