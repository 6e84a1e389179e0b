#!/usr/bin/env bash
# Experts from elsewhere: aligned by others on most questions of their task, while whoever fuses knows few mixed ones.
# Fusion, one LoRA from the base, one that goes on from a merge (an adapter of the same size), a merge tuned on these
# questions: nats against their number.
#
#   bash runs/elsewhere.sh --data_source DIR
#
# For each number of mixed questions (--mixed; --run_mixed: some of them alone) every method tries several numbers of
# epochs; which one counts is chosen on questions held apart (one seed, `--half held_apart`, the first run), then scored
# on the test half (`--half test --seeds 42,43,44 --epochs EPOCHS`; a method that EPOCHS does not name is left out).
# --methods: try only these on the questions held apart. Run it again to resume it where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

. runs/rows.sh
take_flags "base_model=smollm2 data_source=sample num_expert_samples=160 mixed=10,40,160 run_mixed= num_held_apart=60
    num_scored= num_train_epochs=2 batch_size=4 dtype=auto seeds=42 half=held_apart methods= epochs= save= reuse= results_dir=results/elsewhere" "$@"
case $HALF:$SEEDS in held_apart:*,*) refuse "--seeds $SEEDS: on questions held apart one seed; another holds others apart" ;; esac
case $HALF:$EPOCHS in held_apart: | test:?*) ;; *) refuse "--half test takes --epochs, METHOD_NUMBER=EPOCHS with commas (mixed_10=8,...); held_apart does not" ;; esac
all_methods="mixed merged fused ungated initialised prompted slow routers frozen"
case $HALF:$METHODS in test:?*) refuse "--methods $METHODS: on the test half these are the methods that --epochs names" ;; esac
for one in $(echo "$METHODS" | tr ',' ' '); do
    case " $all_methods " in *" $one "*) ;; *) refuse "--methods $METHODS: $one is none of $all_methods" ;; esac
done
: "${RUN_MIXED:=$MIXED}"
for number in $(echo "$RUN_MIXED" | tr ',' ' '); do
    case ",$MIXED," in *",$number,"*) ;; *) refuse "--run_mixed $RUN_MIXED: $number is none of --mixed $MIXED" ;; esac
done
R="--results_dir $RESULTS_DIR" AT_ONCE=1 own_experts=""
if [ $HALF = held_apart ]; then
    HALF="--dataset_type held_apart" SCORED_ON="--dataset_type held_apart"
    : "${NUM_SCORED:=-1}"
else
    HALF="" SCORED_ON="--comparisons 0"
    : "${NUM_SCORED:=200}"
fi
dealt() {  # the training questions of $seed: every seed deals them anew; what is scored is the first one's
    DATA=$RESULTS_DIR/data$s
    SCORE="--base_model $BASE_MODEL --data_source $RESULTS_DIR/data/experts $SCORED_ON --num_samples $NUM_SCORED --dtype $DTYPE"
    python data/split.py --data_source $DATA_SOURCE --output $DATA --mixed $MIXED --num_held_apart $NUM_HELD_APART --seed $seed
}

given=" "
for one in $(echo "$EPOCHS" | tr ',' ' '); do
    name=${one%=*}
    case $given in *" $name "*) refuse "--epochs $EPOCHS: names $name twice" ;; esac
    given="$given$name "
    [[ $one =~ =[0-9]+$ ]] || refuse "--epochs $EPOCHS: $one is not METHOD_NUMBER=EPOCHS"
    case " $all_methods ,$RUN_MIXED," in
        *" ${name%_*} "*",${name##*_},"*) ;;
        *) refuse "--epochs $EPOCHS: $one is of no method here" ;;
    esac
done
LORA="python align_basemodel.py --moe_flag 0 --batch_size $BATCH_SIZE --dtype $DTYPE $R"
epochs_of() {  # NAME EPOCHS...: those that are tried, or the one that was chosen, if any
    local name=$1 of_name
    shift
    if [ -z "$EPOCHS" ]; then
        case ",$METHODS," in ,, | *",${name%_*},"*) echo "$@" ;; esac
        return
    fi
    for of_name in $(echo "$EPOCHS" | tr ',' ' '); do
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
        --num_samples $NUM_EXPERT_SAMPLES --num_train_epochs $NUM_TRAIN_EPOCHS
}
experts() { local task; for task in $TASKS; do once $task$s $(expert $task); done; }
fuse() { experts; once moe$s $FUSE; }
initialise() { experts; once prototype_$number$s $prototype; }
initialise_by_prompt() { experts; once by_prompt_$number$s $by_prompt; }
merge() { experts; once merge_tsv_m$s $TSV_M; }

for seed in $(echo "$SEEDS" | tr ',' ' '); do
    s=$([ $seed = 42 ] || echo _seed_$seed)
    of_experts "$s"
    dealt
    FUSE="python models/llama_moe.py --experts $named_experts --seed $seed --output $RESULTS_DIR/outputs/moe$s $R"
    TSV_M="python models/merging.py --method tsv_m --experts $named_experts --output $RESULTS_DIR/outputs/merge_tsv_m$s $R"

    # no mixed question is needed
    if [ $seed = 42 ]; then row raw nothing nothing; fi
    for task in $TASKS; do row $task$s nothing $(expert $task); done
    row merge_linear$s experts python models/merging.py --method linear --experts $named_experts --output $RESULTS_DIR/outputs/merge_linear$s $R
    row merge_ties$s experts python models/merging.py --method ties --experts $named_experts --output $RESULTS_DIR/outputs/merge_ties$s $R
    row merge_tsv_m$s experts $TSV_M
    row ensemble_probabilities$s experts python models/ensemble.py --experts $named_experts --output $RESULTS_DIR/outputs/ensemble_probabilities$s $R
    row moe$s experts $FUSE

    for number in $(echo "$RUN_MIXED" | tr ',' ' '); do
        case $number in ? | 1?) TRIED="1 2 4 8" ;; ??) TRIED="1 2 3" ;; *) TRIED="1 2" ;; esac
        data="--data_source $DATA/mixed_$number"
        tries mixed_$number nothing $LORA --task_name mix --rank 24 --alpha 12 --seed $seed --base_model $BASE_MODEL $data
        tries merged_$number merge $LORA --task_name mix --init_adapter merge_tsv_m$s --rank 24 --alpha 24 --seed $seed --base_model $BASE_MODEL $data
        align="python align_basemodel.py --moe_flag 1 --router_learning_rate 0.01 --seed $seed --batch_size $BATCH_SIZE --dtype $DTYPE $data $R"
        tries fused_$number fuse $align --gate_loss_weight 0.3 --moe_dir $RESULTS_DIR/outputs/moe$s
        tries ungated_$number fuse $align --gate_loss_weight 0 --moe_dir $RESULTS_DIR/outputs/moe$s
        from_prompts="python models/llama_moe.py --router_init prototype --num_prompts $number $data --dtype $DTYPE --experts $named_experts --seed $seed $R"
        prototype="$from_prompts --output $RESULTS_DIR/outputs/prototype_$number$s"
        by_prompt="$from_prompts --routing prompt --output $RESULTS_DIR/outputs/by_prompt_$number$s"
        tries initialised_$number initialise $align --gate_loss_weight 0.3 --moe_dir $RESULTS_DIR/outputs/prototype_$number$s
        tries prompted_$number initialise_by_prompt $align --gate_loss_weight 0.3 --moe_dir $RESULTS_DIR/outputs/by_prompt_$number$s
        slow="${align/--router_learning_rate 0.01/--router_learning_rate 1e-4} --moe_dir $RESULTS_DIR/outputs/by_prompt_$number$s"
        tries slow_$number initialise_by_prompt $slow --gate_loss_weight 0.3
        tries routers_$number initialise_by_prompt $slow --gate_loss_weight 0.3 --train_experts 0
        tries frozen_$number initialise_by_prompt ${align/--router_learning_rate 0.01 /} --train_router 0 --moe_dir $RESULTS_DIR/outputs/by_prompt_$number$s
        row tuned_$number$s experts python models/merging.py --method task_arithmetic --num_held_apart -1 $data --dtype $DTYPE \
            --experts $named_experts --output $RESULTS_DIR/outputs/tuned_$number$s $R
        row prototype_$number$s experts $prototype
        row by_prompt_$number$s experts $by_prompt
    done
done

python evaluator/report.py --runs $names --reference ensemble_probabilities ${REUSE:+--saved "$REUSE"} ${SAVE:+--save "$SAVE"} $HALF $R
