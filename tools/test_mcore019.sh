#!/usr/bin/env bash
# Every test with Megatron-Core 0.19 on Python 3.12, in an environment of their own (tools/setup_mcore019.sh): by hand, not in continuous integration.
# Arguments go to tests/run.sh: bash tools/test_mcore019.sh -k layouts
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_mcore019.sh
"$PRISM_VENV"/bin/python -m pip list 2>/dev/null | grep -E '^(megatron-core|torch|transformers) '
exec bash tests/run.sh "${@:---all}"
