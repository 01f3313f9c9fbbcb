#!/usr/bin/env bash
# Sets up the environment, lints, checks the types, runs the tests. Arguments go to pytest, with paths from the repository root.
# --faults runs the attacks of tests/faults alone, in full, and writes their counts to work_dirs/faults.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${1:-}" = --faults ] && set -- -m faults tests/faults "${@:2}"

tools/setup.sh --extras all

status=0
.venv/bin/python -m ruff check . || status=$?
.venv/bin/python -m ruff format --check . || status=$?
.venv/bin/python -m mypy || status=$?

workers=$(nproc 2> /dev/null || sysctl -n hw.ncpu)
workers=$((workers < 4 ? workers : 4))
# One thread per worker: otherwise every pytest worker starts a thread pool as wide as the machine.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
tests=0
.venv/bin/python -m pytest -q -n "$workers" --durations=10 "$@" || tests=$?
exit $((status ? status : tests))
