#!/usr/bin/env bash
# Set up the environment and run the linter and the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements-dev.txt
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
