#!/usr/bin/env bash
# Measure a checkpoint on several GPUs of this machine (tools/test.py --help shows all flags).
#
#   tools/dist_test.sh CONFIG FILE GPUS --data-root DIR --work-dir DIR --cfg-options k=v ...
#
# GPUS is a number, or "all". Without a GPU it counts CPU processes. Several nodes: NNODES, NODE_RANK, MASTER_ADDR and
# PORT, on each.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
case ${1:-} in
  -h | --help) exec "$python" "$root/tools/test.py" --help ;;
esac
if [[ $# -lt 3 || $3 == -* ]]; then
  echo "usage: tools/dist_test.sh CONFIG FILE GPUS [flags of tools/test.py]" >&2
  exit 2
fi
exec "$python" "$root/tools/test.py" "$1" "$2" --gpus "$3" "${@:4}"
