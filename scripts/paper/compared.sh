# Sourced by the scripts beside it; makes the environment, and has the function that they end with.
# Usage: source scripts/paper/compared.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh" requirements.txt

# compared PAPER SCRIPT OUTPUT FLAGS..: runs scripts/SCRIPT.py into OUTPUT, then sets its top-1 beside the published.
compared() {
    local paper=$1 script=$2 output=$3
    shift 3
    for flag in "$@"; do
        [[ $flag != --output* ]] || { echo "error: --output is given as OUTPUT= here" >&2; exit 2; }
    done
    .venv/bin/python "scripts/$script.py" --datapool "$output/datapool" "$@" --output "$output"
    echo
    .venv/bin/python scripts/paper/published.py "$paper" "$output"
}

# required NAME WHAT: ends with one line where the variable is not set.
required() {
    [ -n "${!1:-}" ] || { echo "error: give $1=, $2 (or --tiny)" >&2; exit 2; }
}
