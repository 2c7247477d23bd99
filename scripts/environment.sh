# Sourced by the other scripts: goes to the repository's root, makes or reuses .venv there, installs what is needed.
# Usage: source scripts/environment.sh REQUIREMENTS; honours PYTHON, the interpreter to make .venv with.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
requirements=$1
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or newer is needed; set PYTHON to one" >&2
    exit 2
fi
# A .venv that was left half-made or whose Python is gone is made again over what is there.
[ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv || exit 1
# The marker holds what was installed, so an unchanged environment starts at once.
marker=.venv/installed-$(basename "$requirements")
if ! cat requirements*.txt | cmp -s - "$marker"; then
    echo "installing $requirements into .venv (PyTorch is several GB; about a minute or two)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" || exit 1
    cat requirements*.txt >"$marker"
fi
