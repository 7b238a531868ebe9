#!/bin/bash
# A run on several machines under Slurm, which goes on by itself when its time is up. From the repository's root:
#   sbatch [--nodes 4 --time 12:00:00 ...] configs/accelerate/slurm.sh RUN_DIR --cfg proteus_l14.yaml data.root=/data ...
# RUN_DIR and the data lie where all machines see them. CONFIG=configs/accelerate/fsdp.yaml chooses FSDP2.
#SBATCH --job-name=proteus
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

run=${1:?RUN_DIR is missing: sbatch slurm.sh RUN_DIR --cfg ...}
shift
gpus=${SLURM_GPUS_ON_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# 180 seconds before the end Slurm sends USR1 to this shell alone (B:). It goes to one process, the main one, whose pid is
# in the lock and which runs on this machine, the first: the processes agree among themselves to stop after a step. To the
# launchers it must not go, it would be the death of them.
asked=
ask() {
    asked=yes
    pid=$(cat "$run/lock" 2>/dev/null)
    if grep -qs train.py "/proc/${pid:-none}/cmdline"; then
        kill -USR1 "$pid"
    else
        kill "$task" # no trainer yet: there is nothing to save
    fi
}
trap ask USR1

# Single quotes: $SLURM_NODEID is each machine's own. The CPUs of a task are not srun's by themselves since Slurm 22.05.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' bash \
    --config_file "${CONFIG:-configs/accelerate/several_nodes.yaml}" \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * gpus)) \
    --main_process_ip "$head" --main_process_port $((20000 + SLURM_JOB_ID % 20000)) \
    tools/train.py "run.dir=$run" "$@" &
task=$!
wait $task
status=$?
while kill -0 $task 2>/dev/null; do # the signal ended the wait, not the task
    wait $task
    status=$?
done

# Done, or failed by itself: that is the end. Stopped because it was asked to: the same job again, from its checkpoint.
if [[ $asked && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
