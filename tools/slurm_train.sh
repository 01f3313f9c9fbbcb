#!/usr/bin/env bash
# Train on a Slurm cluster (tools/train.py --help shows all flags).
#
#   GPUS=16 GPUS_PER_NODE=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR --pretrained FILE --cfg-options k=v ...
#
# CPUS_PER_TASK (default 8) and SRUN_ARGS are for srun. One task per GPU; they meet at the first node of the job.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help || $# -lt 4 ]]; then
  echo "usage: GPUS=8 GPUS_PER_NODE=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [flags of tools/train.py]"
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
# yapf, which mmengine imports, caches its grammar on the first import ever: here, before many tasks would at once, since
# it shows the file under its name before all of it is written.
"$python" -c 'import yapf'
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
[ "$per_node" -le "$gpus" ] || per_node=$gpus
# The job's number picks the port, so that two jobs on one node do not meet.
# shellcheck disable=SC2016  # expanded by every task, on its node
task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
exec "$@"'
# shellcheck disable=SC2086  # SRUN_ARGS are several words
exec srun --partition="$1" --job-name="$2" --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-8}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  bash -c "$task" task "$python" -u "$root/tools/train.py" "$3" --work-dir "$4" "${@:5}"
