"""Run a function on several ranks of one machine, in about the time of the function.

    first, second = run_ranks(jobs.train, config="zero3", folder=str(tmp_path), passes=(1, 1))

A server process (the standard library's fork server) imports torch, transformers, accelerate and
DeepSpeed once and forks a process per rank, so that a rank starts in milliseconds. It never runs a
kernel itself: forking a process that has started OpenMP threads deadlocks the child. Each rank gets
the environment that `accelerate launch --config_file accelerate_configs/<config>.yaml` would give
it, computed by accelerate's own launcher code from that file.

`function` must live in an importable module (not in a test file's closure), take its rank first and
return something that pickles.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fsdp_on_cpu import allow_fsdp_on_cpu
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
# What the server imports before the first fork: the heavy libraries, and the lazy modules of
# transformers and DeepSpeed that every rank would otherwise import again.
PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "datasets",
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.deepspeed",
    "accelerate.commands.launch",
    "accelerate.utils.deepspeed",
    "deepspeed",
    "posttrain.trainers.ppo",
    "posttrain.trainers.preference",
    "posttrain.trainers.reward",
    "posttrain.trainers.sft",
]
SERVER_ENV = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
GRACE_SECONDS = 5.0  # what the other ranks get to notice that one has failed
STACK_LEAD_SECONDS = 2.0  # a rank that hangs writes its stack this long before it is killed
LOG_TAIL = 3000  # characters of a failed rank's output that the error shows


class RankFailure(AssertionError):
    """One or more ranks raised, died or hung; the message holds what each of them said."""


def run_ranks(
    function: Callable[..., Any],
    *,
    config: str = "ddp",
    world_size: int = 2,
    timeout_seconds: float = 60.0,
    **arguments: Any,
) -> list[Any]:
    """`[function(rank, **arguments) for rank in range(world_size)]`, each in its own process.

    `config` names a file of `accelerate_configs/`; world size 1 starts one plain process, as
    `python recipes/x.py` would.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with patch.dict(os.environ, SERVER_ENV):
        multiprocessing.forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as logs:
        ranks = []
        port = _free_port()
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            place = {"rank": rank, "world_size": world_size, "port": port, "config": config}
            log = Path(logs, f"rank{rank}.log")
            target_args = (function, arguments, place, log, timeout_seconds, sender)
            process = context.Process(target=_rank_main, args=target_args, daemon=True)
            process.start()
            sender.close()  # so that the pipe closes when the rank dies
            ranks.append((process, receiver, log))
        answers = _collect([receiver for _, receiver, _ in ranks], timeout_seconds)
        for process, _, _ in ranks:
            process.kill()
            process.join()
        _raise_failures(answers, [log for _, _, log in ranks], timeout_seconds)
    return [value for _, value in answers]


def launch_environment(config: str, num_processes: int) -> dict[str, str]:
    """The variables that `accelerate launch` sets for this config, without torchrun's own."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    flags = ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    flags += ["--num_processes", str(num_processes), "--main_process_port", "0", "recipe.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {k: v for k, v in environment.items() if os.environ.get(k) != v}


def _rank_main(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    place: dict[str, Any],
    log: Path,
    timeout_seconds: float,
    sender: Connection,
) -> None:
    """Body of a rank: environment, output into a file, result or traceback into the pipe."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(max(1.0, timeout_seconds - STACK_LEAD_SECONDS))
    gc.freeze()  # accelerate collects garbage after each training: not all that is imported
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that outlives the rank
    try:
        if place["world_size"] > 1:
            os.environ.update(launch_environment(place["config"], place["world_size"]))
            os.environ.update(_torchrun_environment(place))
        if place["config"] == "fsdp2":
            allow_fsdp_on_cpu()
        answer = pickle.dumps(("ok", function(place["rank"], **arguments)))
    except BaseException:  # the boundary between processes: whatever it was is reported
        answer = pickle.dumps(("raised", traceback.format_exc()))
    # Not `send`: it would share a tensor's memory, which dies with this process.
    sender.send_bytes(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no destructors: a process group waits for peers that may be gone


def _torchrun_environment(place: dict[str, Any]) -> dict[str, str]:
    rank, world_size = str(place["rank"]), str(place["world_size"])
    return {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(place["port"]),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _collect(receivers: list[Connection], timeout_seconds: float) -> list[tuple[str, Any]]:
    """What each rank sent before the deadline; the first failure shortens the deadline."""
    answers: list[tuple[str, Any]] = [("hung", "")] * len(receivers)
    deadline = time.monotonic() + timeout_seconds
    pending = list(receivers)
    while pending and (left := deadline - time.monotonic()) > 0:
        for receiver in wait(pending, timeout=left):
            pending.remove(receiver)
            try:
                answer = pickle.loads(receiver.recv_bytes())
            except EOFError:
                answer = ("died", "")
            answers[receivers.index(receiver)] = answer
            if answer[0] != "ok":
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return answers


def _raise_failures(
    answers: list[tuple[str, Any]], logs: list[Path], timeout_seconds: float
) -> None:
    if all(outcome == "ok" for outcome, _ in answers):
        return
    parts = [f"a rank failed, or did not answer within {timeout_seconds:.0f} s"]
    for rank, (outcome, detail) in enumerate(answers):
        said = logs[rank].read_text(errors="replace")[-LOG_TAIL:] if logs[rank].exists() else ""
        parts.append(f"--- rank {rank} {outcome}\n{detail if outcome != 'ok' else ''}")
        parts.append(f"    its output:\n{said}" if said else "    (no output)")
    raise RankFailure("\n".join(parts))
