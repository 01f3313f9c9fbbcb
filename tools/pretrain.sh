#!/usr/bin/env bash
# Pretrain SemAIM (tools/pretrain.py --help shows all flags).
#
#   tools/pretrain.sh                          ViT-B/16, 800 epochs, on data/imagenet, all visible GPUs
#   tools/pretrain.sh CONFIG GPUS --data-root DIR --work-dir DIR --resume --cfg-options k=v ...
#
# Without a GPU, GPUS counts CPU processes. Several nodes: NNODES, NODE_RANK, MASTER_ADDR and PORT, on each.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$root/tools/pretrain.py" "$@"
