"""scripts/slurm.sh with SLURM played by three small programs: when it queues itself again."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sh"
# Runs the step of one node, as SLURM would on each.
SRUN = 'shift\nSLURM_PROCID=0 exec "$@"\n'
SCONTROL = "case $1 in show) echo node1;; requeue) echo $2 >> requeued;; esac\n"
ACCELERATE = 'echo "$@" > launched\n'
CHECKPOINT = "runs/x/checkpoints/checkpoint-3"
SAVED = f"mkdir -p {CHECKPOINT}; touch {CHECKPOINT}/manifest.json\n"


def submit(folder: Path, launcher: str, *flags: str) -> subprocess.CompletedProcess:
    """The job in `folder`; `launcher`: what the launcher does beside noting its command line."""
    (folder / "bin").mkdir()
    programs = {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE + launcher}
    for name, program in programs.items():
        path = folder / "bin" / name
        path.write_text("#!/bin/bash\n" + program)
        path.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }
    command = ["bash", str(SCRIPT), "ddp.yaml", "recipes/sft.py", *flags]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **job}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("launcher", "status", "is_requeued"),
    [
        ("mkdir -p runs/x/model", 0, False),
        (SAVED + "exit 143", 143, True),
        (SAVED + "exit 0", 0, True),  # --exit_zero_on_stop
        ("exit 2", 2, False),  # a mistake would be made again
    ],
)
def test_a_run_goes_back_to_the_queue_until_its_model_is_there(
    launcher, status, is_requeued, tmp_path
):
    done = submit(tmp_path, launcher, "--output_dir", "runs/x")
    assert done.returncode == status, done.stderr
    assert (tmp_path / "requeued").exists() == is_requeued
    launched = (tmp_path / "launched").read_text()
    assert "--num_machines 2 --num_processes 16 --machine_rank 0" in launched
    assert "--main_process_ip node1 " in launched
    assert launched.rstrip().endswith("recipes/sft.py --output_dir runs/x --resume")


def test_without_a_folder_it_says_what_it_needs(tmp_path):
    done = submit(tmp_path, "", "--max_steps", "3")
    assert done.returncode == 2
    assert "expected --output_dir FOLDER" in done.stderr
