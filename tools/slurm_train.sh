#!/usr/bin/env bash
# Train on a Slurm cluster (tools/train.py --help shows all flags).
#
#   GPUS=16 GPUS_PER_NODE=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR --pretrained FILE --cfg-options k=v ...
#
# CPUS_PER_TASK (default 8) and SRUN_ARGS are for srun. One task per GPU; they meet at the first node of the job.
#
# REQUEUE=1: submits a job (sbatch) that saves 120 s before its time is over (NOTICE=seconds), queues again and goes on
# from there, until the run is finished. It also goes on after a preemption; scancel ends it. SRUN_ARGS, such as
# --time=24:00:00, are for sbatch too. In a batch script of your own: #SBATCH --signal=USR1@120 --requeue
# --open-mode=append, and as its last line REQUEUE=1 exec tools/slurm_train.sh ...; then --signal=B:USR1@120 works too.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help || $# -lt 4 ]]; then
  echo "usage: [REQUEUE=1] GPUS=8 GPUS_PER_NODE=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR" \
    "[flags of tools/train.py]"
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
[ "$per_node" -le "$gpus" ] || per_node=$gpus
asked=(--partition="$1" --job-name="$2" --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node"
  --cpus-per-task="${CPUS_PER_TASK:-8}")
flags=("${@:5}")
if [[ ${REQUEUE:-} == 1 ]]; then
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    # shellcheck disable=SC2086  # SRUN_ARGS are several words
    exec sbatch "${asked[@]}" --requeue --open-mode=append --signal="USR1@${NOTICE:-120}" ${SRUN_ARGS:-} \
      --export=ALL --wrap "exec $(printf '%q ' "$root/tools/slurm_train.sh" "$@")"
  fi
  [[ " ${flags[*]-} " == *" --resume"[\ =]* ]] || flags=(--resume "${flags[@]}")
fi
# yapf, which mmengine imports, caches its grammar on the first import ever: here, before many tasks would at once, since
# it shows the file under its name before all of it is written.
"$python" -c 'import yapf'
# The job's number picks the port, so that two jobs on one node do not meet.
# shellcheck disable=SC2016  # expanded by every task, on its node
task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
exec "$@"'
# shellcheck disable=SC2206  # SRUN_ARGS are several words
step=(srun "${asked[@]}" --kill-on-bad-exit=1 ${SRUN_ARGS:-}
  bash -c "$task" task "$python" -u "$root/tools/train.py" "$3" --work-dir "$4" ${flags[@]+"${flags[@]}"})
[[ ${REQUEUE:-} == 1 ]] || exec "${step[@]}"
"${step[@]}" &
pid=$!
for name in USR1 TERM; do # for the batch script alone; srun passes them on to the tasks
  # shellcheck disable=SC2064  # the name of now
  trap "again=1; kill -$name $pid 2> /dev/null || true" "$name"
done
again=1
while [[ $again ]]; do # a signal ends the wait, not the step
  again='' status=0
  wait "$pid" || status=$?
done
if [[ $status == 138 ]]; then # 128 + SIGUSR1: the job's time is over, and the state is saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
