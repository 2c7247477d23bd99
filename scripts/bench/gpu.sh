#!/usr/bin/env bash
# Everything that a GPU owes: checks first, then measurements. Each part is kept in runs/gpu, so the same command goes on
# where it was stopped. Usage: scripts/bench/gpu.sh [--dry] [--device D] [--output DIR]
set -euo pipefail
source "$(dirname "$0")/../environment.sh" requirements.txt
exec .venv/bin/python scripts/bench/gpu.py "$@"
