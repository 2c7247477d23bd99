#!/usr/bin/env bash
# Run the tests with the oldest versions that the requirements files allow and with the newest, each in a fresh
# environment in a temporary folder (several GB; TMPDIR says where). Arguments go to pytest.
# Honours PYTHON; Python 3.11 has wheels of both.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed -n 's/^\([a-z0-9-]*\)>=\([0-9.]*\).*/\1==\2/p' requirements*.txt >"$work/oldest"
: >"$work/newest"

failed=0
for end in oldest newest; do
    echo "== $end =="
    "${PYTHON:-python3}" -m venv "$work/venv"
    python=$work/venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c "$work/$end"
    "$python" -m pip list --format=freeze --disable-pip-version-check >"$work/$end-versions"
    "$python" -m pytest "$@" | tee "$work/$end-log" || failed=1
    rm -r "$work/venv"
done

row() { printf '%-14s %-12s %-12s\n' "$@"; }
version() { grep -i "^$1==" "$work/$2-versions" | cut -d= -f3; }
echo
row package oldest newest
cut -d= -f1 "$work/oldest" | while read -r name; do row "$name" "$(version "$name" oldest)" "$(version "$name" newest)"; done
for end in oldest newest; do echo "$end: $(tail -n 1 "$work/$end-log")"; done
exit $failed
