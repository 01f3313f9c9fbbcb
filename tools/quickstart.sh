#!/usr/bin/env bash
# From nothing to the results table: makes .venv, draws the built-in scenes at their easy level, pretrains a small SemAIM
# on them, and measures it beside random weights on everything there is. Safe to run again: it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1-} in
    '') ;;
    -h | --help) echo "usage: tools/quickstart.sh   (writes data/scenes_easy and work_dirs/quickstart)"; exit 0 ;;
    *) echo "quickstart: unknown argument '$1' (it takes none)" >&2; exit 2 ;;
esac
start=$SECONDS
run=work_dirs/quickstart
tools/setup.sh --extras all
# Two stages side by side, each with half of the cores: so small a network gains little from more threads.
.venv/bin/python tools/reproduce.py --scale quick --scenes data/scenes_easy --work-dir "$run" --jobs 2

echo
echo "Done in $((SECONDS - start)) s. It made, in $run:"
echo "  report.html                        open it in a browser: what came out, with pictures; then table, curves, configs"
echo "  table.md, .csv, .tex, .html        the table, with the published figures"
echo "  semaim/seed0/pretrain/orders.png   validation scenes: image, similarity, learned order, reconstruction"
echo "  semaim/seed0/pretrain/latest.pth   the pretrained checkpoint"
echo "and data/scenes_easy: 10,000 scenes without labels, and 2,500 as class folders, COCO and ADE20K folders"
