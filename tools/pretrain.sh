#!/usr/bin/env bash
# Pretrain (tools/train.py --help shows all flags).
#
#   tools/pretrain.sh                          SemAIM, ViT-B/16, 800 epochs, on data/imagenet, all visible GPUs
#   tools/pretrain.sh CONFIG GPUS --data-root DIR --work-dir DIR --resume --cfg-options k=v ...
#
# Without a GPU, GPUS counts CPU processes. Several nodes: NNODES, NODE_RANK, MASTER_ADDR and PORT, on each.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
config=semaim/configs/pretrain/semaim_vit_base_800e.py gpus=all
if [[ ${1:-} && $1 != -* ]]; then config=$1; shift; fi
if [[ ${1:-} && $1 != -* ]]; then gpus=$1; shift; fi
exec "$tools/dist_train.sh" "$config" "$gpus" "$@"
