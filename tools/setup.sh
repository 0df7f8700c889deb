#!/usr/bin/env bash
# Make .venv with megatron_prism and what its tests need, on a machine without a GPU. A second run returns at once.
# PRISM_TORCH overrides the torch requirement where pip's default build is not the one you want, for example PRISM_TORCH='torch==2.13.0+cpu';
# PRISM_VENV names another folder, PRISM_PYTHON the interpreter. Where pip looks for packages is pip's own configuration.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=${PRISM_TORCH:-torch==2.13.0}
venv=${PRISM_VENV:-.venv}
stamp=$venv/prism-setup
log=$venv/prism-setup.log
wanted="$(cat pyproject.toml setup.py tools/setup.sh <(printf '%s' "$torch") | sha256sum | cut -d' ' -f1) $PWD"

if [ -x "$venv/bin/prism" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

say() { echo "setup: $*" >&2; }

find_python() {
    local name names=(python3.11 python3)
    [ -z "${PRISM_PYTHON:-}" ] || names=("$PRISM_PYTHON")
    for name in "${names[@]}"; do
        # asked, not only looked up: a version manager's shim is there and fails
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    say "found no Python 3.11 or newer as ${names[*]} (python3 is $(python3 --version 2>&1 || true)); install one and run this again"
    return 4
}

step() {
    local what=$1 start=$SECONDS
    shift
    say "$what ..."
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log" >&2
        say "FAILED: $what (the end of its log stands above, all of it in $PWD/$log)"
        exit 4
    fi
    say "$what: $((SECONDS - start)) s"
}

# a virtual environment names its own path in its scripts: one that was moved here is made anew
if [ -f "$stamp" ] && [ "$(cut -d' ' -f2- "$stamp")" != "$PWD" ]; then
    rm -rf "$venv"
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    rm -rf "$venv"
    mkdir "$venv"
    step "virtual environment with $("$python" --version)" "$python" -m venv "$venv"
fi
rm -f "$stamp"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# torch first and alone: the next line then keeps this build instead of choosing its own
step "$torch" "$venv/bin/python" -m pip install "$torch"
step "megatron_prism with [cpu,dev]" "$venv/bin/python" -m pip install -e '.[cpu,dev]'
# Transformer Engine's Python half, outside the path of imports: tests/te constructs its layers on a stand-in for the compiled half
step "transformer-engine's Python half" "$venv/bin/python" -m pip install --no-deps --target "$venv/transformer_engine_python" transformer-engine==2.11.0
printf '%s\n' "$wanted" >"$stamp"
say "ready: $PWD/$venv, $SECONDS s"
