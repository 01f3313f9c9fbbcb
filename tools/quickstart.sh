#!/usr/bin/env bash
# From nothing to a pretrained model: makes .venv, draws the built-in scenes, pretrains a small SemAIM on them, and
# shows what it learned. Safe to run again: it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1-} in
    '') ;;
    -h | --help) echo "usage: tools/quickstart.sh   (writes data/scenes and work_dirs/quickstart)"; exit 0 ;;
    *) echo "quickstart: unknown argument '$1' (it takes none)" >&2; exit 2 ;;
esac
start=$SECONDS
tools/setup.sh
python=.venv/bin/python
run=work_dirs/quickstart

"$python" -m semaim.data.scenes data/scenes --images 1000 --size 96 --seed 0
"$python" tools/train.py semaim/configs/pretrain/semaim_vit_tiny_scenes.py --work-dir "$run" --resume

mapfile -t images < <(find data/scenes/classes/val -name '*.jpg' | sort | awk 'NR % 25 == 1')
"$python" tools/visualize.py order "$run/latest.pth" "${images[@]}" --out "$run/orders.png"
"$python" tools/visualize.py curve "$run" --out "$run/curve.png"

echo
echo "Done in $((SECONDS - start)) s. It made:"
echo "  data/scenes              1000 scenes as class folders, COCO and ADE20K folders"
echo "  $run/latest.pth    the checkpoint"
echo "  $run/orders.png    validation scenes: image, similarity, learned order, reconstruction"
echo "  $run/orders/       the same for training scenes, before, during and after training"
echo "  $run/curve.png     loss and learning rate"
