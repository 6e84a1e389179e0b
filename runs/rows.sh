# Rows of a comparison, for the files beside this one: each is made, scored and kept once, or taken over.
#
# `row` needs R (--results_dir ...), SCORE (the flags of evaluate_likelihood.py), SAVE and REUSE (folders of kept rows, or
# ""), HALF (the flags that name the half to report.py, or ""), AT_ONCE (1: each row is scored and kept as soon as it is
# made; 0: by `score`), own_experts (the names of the kept experts that rows are made from); if wanted ASKS (more flags of
# reuse.py).

TASKS="helpfulness safety truthfulness"
refuse() { echo "error: $*" >&2; exit 2; }
variable() { echo "$1" | tr a-z A-Z; }
take_flags() {  # "NAME=DEFAULT ..." ARGUMENT...: sets $NAME, in capitals, of each; refuses a flag of another name
    local known=$1 one value
    shift
    for one in $known; do printf -v "$(variable ${one%%=*})" %s "${one#*=}"; done
    while [ $# -gt 0 ]; do
        case $1:" $(echo $known) " in --*:*" ${1#--}="*) ;; *) refuse "$1: is no flag of $0, which takes$(for one in $known; do echo -n " --${one%%=*}"; done)" ;; esac
        [ $# -ge 2 ] || refuse "$1: needs a value"
        case $2 in *[[:space:]]*) refuse "$1 '$2': holds a space, which no flag here takes (a place gets another name by ln -s)" ;; esac
        case $1:$2 in --data_source:hub | --data_source:sample | *:/*) ;; --data_source:* | --save:* | --reuse:* | --results_dir:*)
            [ "$OLDPWD" -ef . ] || refuse "$1 $2: is a place below the repository for this file; called from elsewhere, give its whole path" ;; esac
        printf -v "$(variable ${1#--})" %s "$2"
        shift 2
    done
    for one in $known; do
        one=${one%%=*} value=$(variable ${one%%=*}) value=${!value}
        case $one:${value#-} in
            num_train_epochs:*) ;;
            num_*:*[!0-9]* | *batch_size:*[!0-9]* | max_new_tokens:*[!0-9]*) refuse "--$one $value: is no whole number" ;;
            reuse:?*) [ -d "$value" ] || refuse "--reuse $value: no such folder" ;;
        esac
    done
    case $SEEDS in *[!0-9,]*) refuse "--seeds $SEEDS: are whole numbers with commas" ;; esac
    case ,$SEEDS, in ,42,*) ;; *) refuse "--seeds $SEEDS: begin with 42, whose runs have no seed in their names" ;; esac
}
of_experts() {  # SUFFIX: what follows is made of the experts of these names: $own_experts, and $named_experts for --experts
    own_experts="" named_experts=""
    for task in $TASKS; do
        own_experts=${own_experts:+$own_experts,}$task$1 named_experts=${named_experts:+$named_experts,}$task=$task$1
    done
}

names=""       # of all rows
anew=""        # of those that were not taken over
made=""        # what this process has made, or seen to be made
unscored=""    # of these rows
also=nothing   # what else is scored of a row
once() {  # NAME COMMAND...: run a command that makes something, if this process has not
    case ",$made," in *",$1,"*) return ;; esac
    "${@:2}"
    made=$made,$1
}
begins_with() {  # COMMAND...: the command that makes the fusion or the merge that this one begins with, if any
    local one before="" beginning="" begun
    for one in "$@"; do
        case $before in --moe_dir | --init_adapter) beginning=${one##*/} ;; esac  # of several the last one counts
        before=$one
    done
    [ -n "$beginning" ] || return 0
    begun=$(
        row() { :; }
        once() { case "$* " in *" --output "*"/$beginning "*) echo "${*:3}" ;; esac; }
        $needs
    )
    [ -n "$begun" ] || refuse "$beginning: $needs makes nothing of this name"
    echo "$begun"
}
reused() {  # NAME COMMAND...: whether --reuse has this row, made and scored as it would be here
    [ -n "$REUSE" ] || return 1
    local name=$1 status=0 expert begun_by
    shift
    case $1 in python) shift ;; nothing) set -- "" ;; esac
    local asks="${ASKS:-}"
    case $needs in
        nothing | fuse_fresh) ;;
        *)  # made from these
            for expert in $(echo "$own_experts" | tr ',' ' '); do
                case "$anew," in *",$expert,"*) echo "$name: not taken over: its expert $expert is made anew"; return 1 ;; esac
            done
            asks="$asks --experts $own_experts"
            ;;
    esac
    begun_by=$(begins_with "$@") || exit 2
    if [ "$also" != nothing ]; then asks="$asks --drift 1"; fi
    python evaluator/reuse.py --run $name --saved "$REUSE" --made_by "$*" --begun_by "$begun_by" $asks $SCORE || status=$?
    [ $status = 0 ] || [ $status = 3 ] || exit $status
    return $status
}
row() {  # NAME NEEDS COMMAND...: make a row, score and keep it; NEEDS: the function that makes what it is made from
    local name=$1 needs=$2
    shift 2
    names=${names:+$names,}$name
    if reused $name "$@"; then return; fi
    anew=$anew,$name
    $needs
    once $name "$@"
    $also --run $name
    unscored=${unscored:+$unscored,}$name
    if [ $AT_ONCE = 1 ]; then score; fi
}
score() {  # by likelihood, what is not scored yet
    [ -n "$unscored" ] || return 0
    python evaluator/evaluate_likelihood.py --run $unscored $SCORE $R
    if [ -n "$SAVE" ]; then python evaluator/report.py --runs $unscored --save "$SAVE" --only_save 1 $HALF $R; fi
    unscored=""
}
nothing() { :; }
