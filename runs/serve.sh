#!/usr/bin/env bash
# Export a fused run, serve it, and say when it answers; Ctrl-C stops the server.
#
#   bash runs/serve.sh RUN [--engine vllm] [--to shared] [--dtype auto] [--port 8000] [--results_dir results]
#
# Engines: vllm, and transformers (pip install "transformers[serving]"), which takes --to mixtral or qwen3_moe only.
set -euo pipefail
cd "$(dirname "$0")/.."
refuse() { echo "error: $*" >&2; exit 2; }
[ $# -gt 0 ] && [ "${1#--}" = "$1" ] || refuse "name the fused run first: bash runs/serve.sh RUN"
RUN=$1 ENGINE=vllm TO=shared DTYPE=auto PORT=8000 RESULTS_DIR=results
shift
while [ $# -gt 0 ]; do
    case $1 in --engine | --to | --dtype | --port | --results_dir) ;; *) refuse "$1: is no flag of $0" ;; esac
    [ $# -ge 2 ] || refuse "$1: needs a value"
    printf -v "$(echo "${1#--}" | tr a-z A-Z)" %s "$2"
    shift 2
done
case $TO in shared | mixtral | qwen3_moe) ;; *) refuse "--to $TO: must be shared, mixtral or qwen3_moe" ;; esac
case $PORT in '' | *[!0-9]*) refuse "--port $PORT: must be a number" ;; esac
OUTPUT=$RESULTS_DIR/exports/$(basename "$RUN")_$TO$([ "$DTYPE" = auto ] || echo "_$DTYPE")
case $ENGINE in
    transformers) SERVE=(transformers serve "$OUTPUT" --port "$PORT") ;;
    vllm) SERVE=(vllm serve "$OUTPUT" --host 127.0.0.1 --port "$PORT") ;;
    *) refuse "--engine $ENGINE: must be transformers or vllm" ;;
esac
[ $TO$ENGINE != sharedtransformers ] || refuse "--to shared: transformers serve loads transformers' own classes only; take --to mixtral, or --engine vllm"
listens() { (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; }
if listens; then refuse "--port $PORT: something else listens there; take another"; fi
command -v "$ENGINE" > /dev/null || refuse "--engine $ENGINE: is not installed"
[ $TO != shared ] || SERVE+=(--trust-remote-code)
[ $TO$ENGINE != sharedvllm ] || SERVE+=(--model-impl transformers)

python models/export.py --cross_task "$RUN" --to "$TO" --dtype "$DTYPE" --output "$OUTPUT" --results_dir "$RESULTS_DIR"
if [ $ENGINE = vllm ]; then  # which would take another for float32
    SERVE+=(--dtype "$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['dtype'])" "$OUTPUT/config.json")")
fi
echo "${SERVE[*]}"
"${SERVE[@]}" &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT
until python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$PORT/health', timeout=2)" 2> /dev/null; do
    kill -0 $server 2> /dev/null || refuse "the server stopped before it answered; see above"
    sleep 1
done
kill -0 $server 2> /dev/null || refuse "the server stopped, and another answers at port $PORT; see above"
echo "$OUTPUT answers at http://127.0.0.1:$PORT/v1. From another terminal:"
echo "  python inference.py --task_name safety --cross_task $RUN --server_url http://127.0.0.1:$PORT/v1 --server_model $OUTPUT"
wait $server
