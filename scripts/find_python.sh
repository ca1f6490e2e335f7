#!/usr/bin/env bash
# Prints the path of the Python that the environment is to be built from; Python 3.12 or 3.13.
#
# Looks at $PYTHON alone where it is set, else at every python3.12 and python3.13 on PATH, then at
# pyenv's versions folder ($PYENV_ROOT, or ~/.pyenv), newest 3.12 first. A candidate counts only if
# it really starts: a pyenv shim may exist on PATH for a version that pyenv then refuses to run.
# What is printed is the interpreter itself, never a shim, nor the python of an active environment.
#
# Where none fits: status 1, and on standard error what was tried and what was wrong with each.
set -euo pipefail

# Runs under any Python, old ones included. Status 3: its output says why this one does not fit.
judge='
import sys
if not (3, 12) <= sys.version_info[:2] <= (3, 13):
    print("is Python %d.%d" % sys.version_info[:2])
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError as error:
    print("cannot make environments: %s; install its venv package" % error)
    sys.exit(3)
print(getattr(sys, "_base_executable", None) or sys.executable)
'

candidates() {
    local version
    if [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
        return
    fi
    for version in 3.12 3.13; do
        type -aP "python$version" || true
    done
    for version in 3.12 3.13; do
        find "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions" -mindepth 1 -maxdepth 1 \
            -name "$version.*" 2>/dev/null | sort -rV | sed 's,$,/bin/python,' || true
    done
}

tried=""
while read -r candidate; do
    status=0
    answer=$("$candidate" -c "$judge" 2>/dev/null </dev/null) || status=$?
    case $status in
        0)
            echo "$answer"
            exit 0
            ;;
        3) reason=$answer ;;
        *) reason="does not start" ;;
    esac
    tried+="  $candidate: $reason"$'\n'
done < <(candidates)

{
    echo "error: Python 3.12 or 3.13 is needed (on older ones megatron-core comes without" \
        "megatron.training), and none was found. Tried:"
    printf '%s' "${tried:-  no python3.12 or python3.13 on PATH, no pyenv version
}"
    echo "Install Python 3.12, or name one: PYTHON=/path/to/python3.12 scripts/install.sh"
} >&2
exit 1
