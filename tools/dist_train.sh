#!/usr/bin/env bash
# Train on several GPUs of this machine (tools/train.py --help shows all flags).
#
#   tools/dist_train.sh CONFIG GPUS --pretrained FILE --data-root DIR --work-dir DIR --resume --cfg-options k=v ...
#
# GPUS is a number, or "all". Without a GPU it counts CPU processes. Processes meet at a free port. Several nodes:
# NNODES, NODE_RANK, MASTER_ADDR and PORT, on each.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
case ${1:-} in
  -h | --help) exec "$python" "$root/tools/train.py" --help ;;
esac
if [[ $# -lt 2 || $2 == -* ]]; then
  echo "usage: tools/dist_train.sh CONFIG GPUS [flags of tools/train.py]" >&2
  exit 2
fi
exec "$python" "$root/tools/train.py" "$1" --gpus "$2" "${@:3}"
