#!/usr/bin/env bash
# Tasks in conflict: one expert that has learnt to refuse beside one that has learnt to help. How far each method goes from
# preferring unsafe answers without refusing what only looks unsafe, and what a dial on the routers adds without training.
#
#   bash runs/conflict.sh --data_source DIR [--seeds 42,43,44]
#
# DIR needs safety_pairs.jsonl: one half's safe answers are learnt from, the other half is scored (data/refusals.py).
# Run it again to resume it where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

. runs/rows.sh
take_flags "base_model=smollm2 data_source= num_samples=160 num_scored=100 num_answered=100 max_new_tokens=64
    answer_batch_size=16 num_train_epochs=2 batch_size=4 dtype=auto seeds=42 save= reuse= results_dir=results/conflict" "$@"
DIALS="-2 2" MORE_DIALS="-4 4 off only" WEIGHTS="2" GAMMAS="1 0.1"  # MORE_DIALS, WEIGHTS and GAMMAS: seed 42 alone
TASKS="helpfulness safety" OF_TASKS="--tasks helpfulness,safety"
[ -n "$DATA_SOURCE" ] || refuse "name a folder that has safety_pairs.jsonl with --data_source"
DATA=$RESULTS_DIR/data
R="--results_dir $RESULTS_DIR" AT_ONCE=1 own_experts="" HALF=""
SCORE="--base_model $BASE_MODEL --data_source $DATA --num_samples $NUM_SCORED --dtype $DTYPE $OF_TASKS"
TRAIN="--data_source $DATA --num_samples $NUM_SAMPLES --num_train_epochs $NUM_TRAIN_EPOCHS --batch_size $BATCH_SIZE --dtype $DTYPE $R"
ASKS="--num_answered $NUM_ANSWERED --max_new_tokens $MAX_NEW_TOKENS --judged flagged,over_refusal --judge_data_source $DATA_SOURCE"
python data/refusals.py --data_source $DATA_SOURCE --output $DATA

judge() { python evaluator/train_judge.py --kind safety --base_model $BASE_MODEL --data_source $DATA_SOURCE --dtype $DTYPE $R; }
answered() {  # RUN [NAME EXPERT_BIAS]: its answers to unsafe prompts and to those that only look unsafe, judged
    local run=$1 name=${2:-$1} bias=${3:+--expert_bias $3} task
    once judge judge
    for task in safety xstest; do
        python inference.py --task_name $task $([ $run = raw ] && echo --aligned_flag 0 || echo --cross_task $run) $bias --base_model $BASE_MODEL \
            --num_samples $NUM_ANSWERED --max_new_tokens $MAX_NEW_TOKENS --batch_size $ANSWER_BATCH_SIZE --data_source $DATA --dtype $DTYPE $R
    done
    python evaluator/evaluate_safety.py --task_name $([ $run = raw ] || echo cross_)$name --judge $RESULTS_DIR/judges/safety --dtype $DTYPE $R
}
taking_over=0 missing=""
point() {  # NAME NEEDS COMMAND...: a row, and its answers
    if [ $taking_over = 1 ]; then take_over "$@"; return; fi
    SAVE="" row "$@"
    case ",$anew," in *",$1,"*) answered $1; keep $1 ;; esac
}
dial() {  # RUN BIAS: the same run by another bias
    local run=$1 name
    case $2 in safety=only) name=${run}_bias_helpfulness_off ;; *) name=${run}_bias_$(echo $2 | tr '=,' '__') ;; esac
    if [ $taking_over = 1 ]; then take_over $name fuse $FUSED --run_name $run; return; fi
    names=$names,$name
    fuse
    once $run $FUSED --run_name $run
    python evaluator/evaluate_likelihood.py --run $run --expert_bias $2 $SCORE $R
    answered $run $name $2
    keep $name
}
take_over() {  # NAME NEEDS COMMAND...: whether --reuse has this row
    local name=$1 needs=$2
    shift 2
    names=${names:+$names,}$name
    [ -n "$missing" ] || reused $name "$@" || missing=$name
}
keep() { [ -z "$SAVE" ] || python evaluator/report.py --runs $1 --save "$SAVE" --only_save 1 $R; }
expert() { echo python align_basemodel.py --moe_flag 0 --task_name $1 --run_name $1$s --seed $seed --base_model $BASE_MODEL $TRAIN; }
experts() { local task; for task in $TASKS; do once $task$s $(expert $task); done; }
fuse() { experts; once moe$s $FUSE; }
initialise_by_prompt() { experts; once by_prompt$s $BY_PROMPT; }

of_seed() {  # SEED: the commands that make its rows
    seed=$1 s=$([ $1 = 42 ] || echo _seed_$1)
    of_experts "$s"
    FUSE="python models/llama_moe.py --experts $named_experts --seed $seed --output $RESULTS_DIR/outputs/moe$s $R"
    BY_PROMPT="python models/llama_moe.py --routing prompt --router_init prototype --num_prompts $NUM_SAMPLES --data_source $DATA --dtype $DTYPE
        --experts $named_experts --seed $seed --output $RESULTS_DIR/outputs/by_prompt$s $R"
    ALIGN="python align_basemodel.py --moe_flag 1 $OF_TASKS --gate_loss_weight 0.3 --router_learning_rate 0.01 --seed $seed $TRAIN"
    FUSED="$ALIGN --moe_dir $RESULTS_DIR/outputs/moe$s"
    MERGE="python models/merging.py --experts $named_experts $R"
}
all_points() {
    point raw nothing nothing
    for seed in $(echo "$SEEDS" | tr ',' ' '); do
        of_seed $seed
        for task in $TASKS; do point $task$s nothing $(expert $task); done
        point mixed$s nothing python align_basemodel.py --moe_flag 0 --task_name mix $OF_TASKS --rank 16 --alpha 8 --run_name mixed$s --seed $seed --base_model $BASE_MODEL $TRAIN
        point merge_linear$s experts $MERGE --method linear --output $RESULTS_DIR/outputs/merge_linear$s
        point fused$s fuse $FUSED --run_name fused$s
        for value in $DIALS; do dial fused$s safety=$value; done  # without any training
    done
    of_seed 42
    for weight in $WEIGHTS; do
        point merge_linear_safety_$weight experts $MERGE --method linear --weights safety=$weight --output $RESULTS_DIR/outputs/merge_linear_safety_$weight
    done
    for value in $MORE_DIALS; do dial fused safety=$value; done
    point by_prompt experts $BY_PROMPT
    point prompted initialise_by_prompt $ALIGN --moe_dir $RESULTS_DIR/outputs/by_prompt --run_name prompted
    for gamma in $GAMMAS; do point fused_gamma_2_$gamma fuse $FUSED --safety_weight $gamma --run_name fused_gamma_2_$gamma; done  # the paper's way
    point ensemble_probabilities experts python models/ensemble.py --experts $named_experts --output $RESULTS_DIR/outputs/ensemble_probabilities $R
}
if [ -n "$REUSE" ]; then  # all rows, or none: one judge scores all answers
    taking_over=1
    all_points
    if [ -n "$missing" ]; then
        echo "no row is taken over: $missing is made anew, and one judge scores all answers"
        REUSE="" names="" taking_over=0
    fi
fi
[ -n "$REUSE" ] || all_points

python evaluator/report.py --runs $names --reference fused ${REUSE:+--saved "$REUSE"} ${SAVE:+--save "$SAVE"} $R
