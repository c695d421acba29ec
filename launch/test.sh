#!/usr/bin/env bash
# The checks of this repository: set up, then lint, format, types and tests.
# Arguments go to pytest: bash launch/test.sh -m 'not slow' tests/config/test_tree.py
# Without any, two files at a time are tested: much of a test of several processes is waiting.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

set_up dev,mpi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say 'ruff check' && ruff check
say 'ruff format --check' && ruff format --check
say 'mypy' && mypy
(($#)) || set -- -n 2 --dist loadfile --no-loadscope-reorder
say "pytest $*" && exec python -m pytest "$@"
