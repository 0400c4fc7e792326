#!/bin/bash
# A run on several nodes under SLURM that saves before its time is up, and queues itself again until
# the model is there.
#
#   sbatch --nodes 2 scripts/slurm.sh accelerate_configs/zero3.yaml recipes/sft.py \
#       --config my.yaml --output_dir runs/my
#
# Five minutes before the limit SLURM sends SIGTERM to all processes: every rank finishes its step,
# saves and ends. The job then goes back to the queue and continues from that checkpoint.
#SBATCH --job-name posttrain
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --time 24:00:00
#SBATCH --signal TERM@300
#SBATCH --requeue
#SBATCH --open-mode append
set -uo pipefail
# Seconds that a launcher gives its ranks after the signal before it kills them; 30 without this.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280

launch_config=$1 recipe=$2
shift 2
output_dir=$(printf '%s\n' "$@" | grep -A1 -x -e --output_dir | tail -1)
[ -n "$output_dir" ] || { echo "slurm.sh: expected --output_dir FOLDER among the flags" >&2; exit 2; }

nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${SLURM_GPUS_ON_NODE:-1}
main_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$1" --num_machines "$2" --num_processes "$3" \
        --machine_rank "$SLURM_PROCID" --main_process_ip "$4" --main_process_port "$5" "${@:6}"
' launch "$launch_config" "$nodes" "$((nodes * gpus))" "$main_node" "$port" \
    "$recipe" "$@" --resume
status=$?

[ -d "$output_dir/model" ] && exit 0
# 143 is SIGTERM; a launcher that was stopped itself reports 1, so the checkpoint decides.
if [ -n "$(find "$output_dir/checkpoints" -name manifest.json -newer "$0" 2> /dev/null)" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
