#!/usr/bin/env bash
# From nothing to the results table: makes .venv, draws the built-in scenes, pretrains a small SemAIM on them, and
# measures it beside random weights on everything there is. Safe to run again: it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1-} in
    '') ;;
    -h | --help) echo "usage: tools/quickstart.sh   (writes data/scenes and work_dirs/quickstart)"; exit 0 ;;
    *) echo "quickstart: unknown argument '$1' (it takes none)" >&2; exit 2 ;;
esac
start=$SECONDS
run=work_dirs/quickstart
tools/setup.sh --extras all
.venv/bin/python tools/reproduce.py --scale quick --scenes data/scenes --work-dir "$run"

pretrained=$run/semaim/seed0/pretrain
mapfile -t images < <(find data/scenes/classes/val -name '*.jpg' | sort | awk 'NR % 25 == 1')
.venv/bin/python tools/visualize.py order "$pretrained/latest.pth" "${images[@]}" --out "$run/orders.png"

echo
echo "Done in $((SECONDS - start)) s. It made, in $run:"
echo "  report.html                        open it in a browser: the table, curves, orders, predictions, configs"
echo "  table.md, .csv, .tex, .html        the table, beside the published figures"
echo "  orders.png                         validation scenes: image, similarity, learned order, reconstruction"
echo "  semaim/seed0/pretrain/latest.pth   the pretrained checkpoint"
echo "and data/scenes: 1000 scenes as class folders, COCO and ADE20K folders"
