#!/usr/bin/env bash
# The paper's comparison: experts, their fusion, and its rivals, by the project's own commands, into one report.
#
#   bash runs/comparison.sh --base_model smollm2 --data_source DIR --num_samples 160 --seeds 42,43,44
#   bash runs/comparison.sh --quick 1        all kinds of row on smollm2 and data/sample, few rows, one seed: minutes
#   bash runs/comparison.sh --rivals 0       the method and its ablations alone: experts, fusions, no answers
#
# Run it again to resume it where it was stopped: what is done says so and is skipped. --save DIR keeps each row there as
# soon as it is scored; --reuse DIR takes over the rows of such a folder whose settings are these.
set -euo pipefail
cd "$(dirname "$0")/.."

. runs/rows.sh
take_flags "base_model=smollm2 data_source=sample num_samples= num_scored= num_answered= num_train_epochs= batch_size=4
    num_held_apart=30 seeds=42 dtype=auto rivals=1 other_merges= ablations= answers= judge_url= judge_model= quick=0 save= reuse= results_dir=" "$@"
for one in "$QUICK" "$RIVALS" "${ANSWERS:-0}" "${ABLATIONS:-0}" "${OTHER_MERGES:-0}"; do
    case $one in 0 | 1) ;; *) refuse "--quick, --rivals, --answers, --ablations and --other_merges are 0 or 1" ;; esac
done
case $RIVALS:$ANSWERS:$OTHER_MERGES in 0:*1*) refuse "--rivals 0: leaves out the answers and all merges; --answers and --other_merges are 0 then" ;; esac
: "${ANSWERS:=$RIVALS}" "${OTHER_MERGES:=$RIVALS}"
case $NUM_TRAIN_EPOCHS in *[!0-9]*) refuse "--num_train_epochs $NUM_TRAIN_EPOCHS: is a whole number here" ;; esac
case $JUDGE_URL:$JUDGE_MODEL in : | ?*:?*) ;; *) refuse "--judge_url and --judge_model go together" ;; esac
[ $QUICK = 0 ] || [ -z "$JUDGE_URL" ] || refuse "--judge_url: --quick 1 answers no prompt of helpfulness"
[ $ANSWERS = 1 ] || [ -z "$JUDGE_URL" ] || refuse "--judge_url: judges answers, and --answers 0 makes none"
if [ $QUICK = 1 ]; then  # what was not given
    : "${NUM_SAMPLES:=12}" "${NUM_SCORED:=8}" "${NUM_ANSWERED:=2}" "${NUM_TRAIN_EPOCHS:=1}" "${ABLATIONS:=0}" "${RESULTS_DIR:=results/comparison_quick}"
    MERGES="task_arithmetic tsv_m iso_c knots_ties" TUNED="" NEW_TOKENS=16
else
    : "${NUM_SAMPLES:=160}" "${NUM_SCORED:=200}" "${NUM_ANSWERED:=100}" "${NUM_TRAIN_EPOCHS:=2}" "${ABLATIONS:=1}" "${RESULTS_DIR:=results/comparison}"
    MERGES="task_arithmetic dare_ties della sce model_stock tsv_m iso_c knots_ties" TUNED="task_arithmetic ties tsv_m" NEW_TOKENS=128
fi
TOP_KS="1 3" GATES="0 0.01 0.1 1" GAMMAS="0.0001 0.001 0.01 0.1 1"
R="--results_dir $RESULTS_DIR"
TRAIN="--data_source $DATA_SOURCE --num_samples $NUM_SAMPLES --num_train_epochs $NUM_TRAIN_EPOCHS --batch_size $BATCH_SIZE --dtype $DTYPE $R"
FUSE_ALIGN="python align_basemodel.py --moe_flag 1 --gate_loss_weight 0.3 --router_learning_rate 0.01 $TRAIN"
RUN=mix_moe_reg_00000_00000_00000_gate_03000

count() { echo $#; }
num_seeds=$(count $(echo "$SEEDS" | tr ',' ' '))
num_ablations=$((5 + $(count $TOP_KS) + $(count $GATES) + 4 * $(count $GAMMAS)))
echo "The comparison on $BASE_MODEL and $DATA_SOURCE, $NUM_SAMPLES questions per task, seeds $SEEDS, into $RESULTS_DIR:"
echo "  $((3 * num_seeds)) experts, $((RIVALS * (num_seeds * (2 - QUICK) + ABLATIONS))) LoRAs on the mixed data, $num_seeds fusions; of the first seed $((ABLATIONS * num_ablations)) other fusions"
[ $RIVALS = 0 ] || echo "  linear and TIES merges and an averaging ensemble of each seed, $((OTHER_MERGES * $(count $MERGES $TUNED))) other merges and $OTHER_MERGES more ensembles"
echo "  likelihoods of $NUM_SCORED held-out rows per task and run; answers, and 2 to 4 ways to select among them: $([ $ANSWERS = 1 ] && echo "$NUM_ANSWERED prompts per task" || echo none)"
if [ $QUICK = 1 ]; then
    echo "On two CPU cores: about ten minutes."
else
    echo "On two CPU cores with SmolLM2-135M and 160 questions per task: $([ $RIVALS = 1 ] && echo "an hour and a quarter" || echo "about three quarters of an hour") for each seed$(
        [ $OTHER_MERGES = 0 ] || echo ", 40 minutes for the other merges")$(
        [ $ANSWERS = 0 ] || echo ", two hours for the answers and their judges")$(
        [ $ABLATIONS = 0 ] || echo ", seven for the ablations")."
fi

SCORE="--base_model $BASE_MODEL --data_source $DATA_SOURCE --num_samples $NUM_SCORED --dtype $DTYPE" HALF=""
AT_ONCE=$([ $QUICK = 0 ] && [ -n "$SAVE" ] && echo 1 || echo 0)  # rows of minutes each are kept one by one
expert() { echo python align_basemodel.py --moe_flag 0 --task_name $1 --run_name $1$s --seed $seed --base_model $BASE_MODEL $TRAIN; }
experts() { for task in $TASKS; do once $task$s $(expert $task); done; }
fuse() { experts; once moe$s $FUSE; }
of() {  # SEED: what follows is of that seed: $seed, $s behind a run's name, and its experts
    seed=$1 s=$([ $1 = 42 ] || echo _seed_$1)
    of_experts "$s"
    MIXED="python align_basemodel.py --moe_flag 0 --task_name mix --seed $seed --base_model $BASE_MODEL $TRAIN"
    MIXED_24="$MIXED --rank 24 --alpha 12 --run_name mixed_rank_24$s"
    MIXED_24_TWICE="$MIXED --rank 24 --alpha 12 --num_train_epochs $((2 * NUM_TRAIN_EPOCHS)) --run_name mixed_rank_24_twice$s"
    LINEAR="python models/merging.py --method linear --experts $named_experts --output $RESULTS_DIR/outputs/merge_linear$s $R"
    TIES="python models/merging.py --method ties --experts $named_experts --output $RESULTS_DIR/outputs/merge_ties$s $R"
    ENSEMBLE="python models/ensemble.py --experts $named_experts --output $RESULTS_DIR/outputs/ensemble_probabilities$s $R"
    FUSE="python models/llama_moe.py --experts $named_experts --seed $seed --output $RESULTS_DIR/outputs/moe$s $R"
    FUSED="$FUSE_ALIGN --seed $seed --moe_dir $RESULTS_DIR/outputs/moe$s"
}

# 1. For each seed: experts, LoRAs on the mixed data, merges and an ensemble of the experts, their fusion
of 42
if [ $RIVALS = 1 ]; then
    row raw nothing nothing
    template=$(python -c "import sys; from models.base import load_tokenizer; print(load_tokenizer(sys.argv[1]).chat_template is not None)" "$BASE_MODEL" | tail -n 1)  # before it: a conversion's news
    if [ "$template" = True ]; then row raw_chat nothing nothing; else echo "raw_chat: left out, the base has no chat template"; fi
fi
rival() { [ $RIVALS = 0 ] || row "$@"; }
for seed in $(echo "$SEEDS" | tr ',' ' '); do
    of $seed
    for task in $TASKS; do row $task$s nothing $(expert $task); done
    rival mixed_rank_24$s nothing $MIXED_24
    rival merge_linear$s experts $LINEAR
    rival merge_ties$s experts $TIES
    rival ensemble_probabilities$s experts $ENSEMBLE
    row moe$s experts $FUSE
    row $RUN$s fuse $FUSED
    if [ $QUICK = 0 ]; then rival mixed_rank_24_twice$s nothing $MIXED_24_TWICE; fi
    score
done
of 42

# 2. Other merges of the first seed's experts, by usual coefficients and by tuned ones; another average
if [ $OTHER_MERGES = 1 ]; then
    for method in $MERGES; do row merge_$method experts python models/merging.py --method $method $R; done
    for method in $TUNED; do
        row merge_${method}_tuned experts python models/merging.py --method $method --num_held_apart $NUM_HELD_APART --dtype $DTYPE $R
    done
    row ensemble_log_probabilities experts python models/ensemble.py --average log_probabilities $R
    score
fi

# 3. Fusions that differ in one thing
if [ $ABLATIONS = 1 ]; then
    rival mixed_rank_8 nothing $MIXED --run_name mixed_rank_8
    fusion() { local name=$1 needs=$2; shift 2; row $name $needs $FUSED --run_name $name "$@"; }
    PROTOTYPE="python models/llama_moe.py --router_init prototype --dtype $DTYPE --output $RESULTS_DIR/outputs/moe_prototype $R"
    fuse_fresh() { once moe_fresh python models/llama_moe.py --fresh_rank 8 --base_model $BASE_MODEL --output $RESULTS_DIR/outputs/moe_fresh $R; }
    fuse_prototype() { experts; once moe_prototype $PROTOTYPE; }
    row moe_prototype experts $PROTOTYPE
    fusion fused_prototype fuse_prototype --moe_dir $RESULTS_DIR/outputs/moe_prototype
    fusion fused_fresh_experts fuse_fresh --moe_dir $RESULTS_DIR/outputs/moe_fresh --base_model $BASE_MODEL
    row fused_router_frozen fuse ${FUSED/--router_learning_rate 0.01 /} --train_router 0 --run_name fused_router_frozen
    fusion fused_router_alone fuse --train_experts 0
    fusion fused_attention fuse --tune_attention 1
    for k in $TOP_KS; do fusion fused_top_$k fuse --expert_topk $k; done
    for gate in $GATES; do fusion fused_gate_$gate fuse --gate_loss_weight $gate; done
    fused() { fuse; once $RUN $FUSED; }
    for gamma in $GAMMAS; do
        also="python evaluator/embedding_drift.py --reference $RUN --num_samples $NUM_SCORED $R"
        fusion fused_gamma_1_$gamma fused --helpfulness_weight $gamma
        also=nothing
        fusion fused_gamma_2_$gamma fuse --safety_weight $gamma
        fusion fused_gamma_3_$gamma fuse --truthfulness_weight $gamma
        fusion fused_gamma_$gamma fuse --helpfulness_weight $gamma --safety_weight $gamma --truthfulness_weight $gamma
    done
    score
fi

# 4. Answers, what selects among the experts' answers, and small judges' scores of all of them
ANSWERED="raw $TASKS mixed_rank_24 merge_linear merge_ties ensemble_probabilities $RUN" SELECTED="consensus classifier"
of_folder=""  # where the runs that answer are: in $RESULTS_DIR
answer() {  # TASK RUN [FLAG...]
    local task=$1 run=$2
    shift 2
    if [ $run = raw ]; then set -- --aligned_flag 0 "$@"; else set -- --cross_task $of_folder$run "$@"; fi
    python inference.py --task_name $task "$@" --num_samples $NUM_ANSWERED --max_new_tokens $NEW_TOKENS \
        --base_model $BASE_MODEL --data_source $DATA_SOURCE --dtype $DTYPE $R
}
select_from() { # TASK NAME ANSWERS [FLAG...]
    local task=$1 name=$2 answers=$3
    shift 3
    python evaluator/select_answers.py --task_name $task --name $name --answers $answers "$@" $R
}
JUDGE="--base_model $BASE_MODEL --data_source $DATA_SOURCE --dtype $DTYPE $R"
if [ $QUICK = 1 ]; then
    answered=safety judged=flagged
    judges() { python evaluator/train_judge.py --kind safety --num_samples 40 --num_held_out 40 $JUDGE; }
else
    answered="$TASKS xstest" judged=flagged,over_refusal,truth,information SELECTED="$SELECTED more_agents best_of_3"
    judges() {  # of half the labelled rows each: one judge selects, another scores
        for kind in safety truth information; do python evaluator/train_judge.py --kind $kind --half second $JUDGE; done
        for kind in safety truth; do
            python evaluator/train_judge.py --kind $kind --half first --output $RESULTS_DIR/judges/select_$kind $JUDGE
        done
    }
fi
judge_answers() { # NAME...: of runs that answered and of what selected
    local name answers
    for name in "$@"; do
        case $name in raw | consensus | classifier | more_agents | best_of_3) answers=$name ;; *) answers=cross_$name ;; esac
        python evaluator/evaluate_safety.py --task_name $answers --judge $RESULTS_DIR/judges/safety --dtype $DTYPE $R
        if [ $QUICK = 0 ]; then
            python evaluator/evaluate_truth_and_info.py --task_name $answers --mode 0 --judge $RESULTS_DIR/judges/truth --dtype $DTYPE $R
            python evaluator/evaluate_truth_and_info.py --task_name $answers --mode 1 --judge $RESULTS_DIR/judges/information --dtype $DTYPE $R
        fi
        if [ -n "$JUDGE_URL" ]; then  # the paper's win rate, by the model that this server runs
            python evaluator/evaluate_helpfulness.py --task_name $answers --judge alpaca_eval_gpt4 --judge_url $JUDGE_URL --judge_model $JUDGE_MODEL $R
        fi
    done
}
answers_to_sample() {  # the page shows these: data/sample's texts may be handed on
    shown=$RESULTS_DIR/shown
    local R="--results_dir $shown" DATA_SOURCE=sample NUM_ANSWERED=$((QUICK ? 2 : 12)) JUDGE_URL="" of_folder=$RESULTS_DIR/outputs/ task run
    for task in $TASKS; do
        for run in $ANSWERED; do answer $task $run; done
    done
    judge_answers $ANSWERED
}
all_answered=$(echo $ANSWERED $SELECTED | tr ' ' ',')
answers_reused() {
    [ -n "$REUSE" ] && [ -z "$JUDGE_URL" ] || return 1  # a server's judge is not compared: it is asked anew
    local name status=0
    for name in $ANSWERED; do case "$anew," in *",$name,"*) return 1 ;; esac; done  # of other runs
    python evaluator/reuse.py --run $all_answered --saved "$REUSE" $SCORE --num_answered $NUM_ANSWERED --max_new_tokens $NEW_TOKENS --judged $judged || status=$?
    [ $status = 0 ] || [ $status = 3 ] || exit $status
    return $status
}
shown=""  # whose answers the page shows: made here (else those kept in --reuse)
if [ $ANSWERS = 1 ]; then
    for name in $SELECTED; do names=$names,$name; done
    if ! answers_reused; then
        fuse
        once mixed_rank_24 $MIXED_24
        once merge_linear $LINEAR
        once merge_ties $TIES
        once ensemble_probabilities $ENSEMBLE
        once $RUN $FUSED
        judges
        experts_answers=cross_helpfulness,cross_safety,cross_truthfulness
        for task in $answered; do
            for run in $ANSWERED; do answer $task $run; done
            select_from $task consensus $experts_answers
            select_from $task classifier $experts_answers --by classifier --data_source $DATA_SOURCE --num_samples $NUM_SAMPLES
            if [ $QUICK = 0 ]; then
                for other in 43 44; do answer $task truthfulness --seed $other; done
                select_from $task more_agents cross_truthfulness,cross_truthfulness_sample_43,cross_truthfulness_sample_44
                if [ $task = truthfulness ]; then kind=truth; else kind=safety; fi
                select_from $task best_of_3 $experts_answers --by judge --judge $RESULTS_DIR/judges/select_$kind
            fi
        done
        judge_answers $ANSWERED $SELECTED
        if [ $DATA_SOURCE = sample ]; then shown=$RESULTS_DIR; else answers_to_sample; fi
        if [ -n "$SAVE" ]; then
            python evaluator/report.py --runs $all_answered --save "$SAVE" --only_save 1 ${REUSE:+--saved "$REUSE"} $R
        fi
    fi
fi

# 5. The report
python evaluator/report.py --runs $names --reference $RUN --data_source $DATA_SOURCE \
    ${REUSE:+--saved "$REUSE"} ${SAVE:+--save "$SAVE"} ${shown:+--show_answers "$shown"} $R
