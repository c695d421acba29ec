#!/usr/bin/env bash
# The checks of this repository: set up, then lint, format, types and tests.
# Without arguments all tests run but those marked soak_only, three files at a time: much of a test of
# several processes is waiting.
# --soak runs those of random trials alone, and many more of these: kills, stops, faults, files.
# Other arguments go to pytest: bash launch/test.sh -m 'not slow' tests/config/test_tree.py
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

set_up dev,mpi
say 'having DeepSpeed compile its optimizers beside the checks, where they are not yet'
python -c 'from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
CPUAdamBuilder().load(), FusedAdamBuilder().load()' >"$VENV/internvl_ds-optimizers.log" 2>&1 &
compiler=$!
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say 'ruff check' && ruff check
say 'ruff format --check' && ruff format --check
say 'mypy' && mypy
wait "$compiler" || say "DeepSpeed's optimizers cannot be compiled: see $VENV/internvl_ds-optimizers.log"
(($#)) || set -- -m '' -n 3 --dist loadfile --no-loadscope-reorder --durations 25 tests
if [[ ${1-} == --soak ]]; then
  export INTERNVL_DS_SOAK=1
  set -- -m 'soak or soak_only' "${@:2}"
fi
say "pytest $*" && exec python -m pytest "$@"
