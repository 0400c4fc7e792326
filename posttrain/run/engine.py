"""The machine and the engine under a run: device, number format, ranks, DDP, DeepSpeed or FSDP2.

    args = TrainingArguments(use_cpu=settle_use_cpu(), …)       # before accelerate is set up
    assert_world_as_asked(trainer.accelerator)                  # once the trainer is built
    assert_engine_in_place(trainer.accelerator, trainer.model_wrapped)  # as training begins
    with one_pass(accelerator, model, last=…): …            # around each forward and its backward

accelerate downgrades without a word: on a machine without a GPU, two ranks may each believe to be
rank 0 of 1 and write into one folder; a flag for the CPU drops DeepSpeed, and FSDP is dropped on
every CPU. What was asked for stands in the environment that `accelerate launch` or torchrun set.

Every engine averages gradients over ranks, so a loss that is a sum over a global count must be
multiplied by the number of ranks. Under DeepSpeed `accelerator.backward` also takes the optimizer
step, and needs `scale_wrt_gas=False` to leave the loss undivided.
"""

from __future__ import annotations

import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from posttrain.errors import ConfigError
from posttrain.run.options import is_main_process

TRUE_WORDS = ("1", "true", "yes", "y", "t", "on")  # what accelerate takes for true
AMPERE = (8, 0)  # the first CUDA generation with real bfloat16, and with FlashAttention
# "DeepSpeed": the stage stands in a DeepSpeed config file, not in the environment.
DEEPSPEED = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "DeepSpeed")
SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)  # communicate in every pass
CONFIGS = "accelerate launch --config_file accelerate_configs/{}.yaml"


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Return True if an environment variable has one of accelerate's words for true."""
    return environment.get(name, "").lower() in TRUE_WORDS


def this_device(environment: Mapping[str, str] = os.environ) -> torch.device:
    """Return this process's own GPU, or the CPU: without CUDA, or if accelerate got `--cpu`."""
    if torch.cuda.is_available() and not is_set(environment, "ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def half_dtype(dtype: str, environment: Mapping[str, str] = os.environ) -> torch.dtype | None:
    """Return the format that forwards compute in by autocast for this `--dtype`; None: float32.

    `auto` is bfloat16 on a GPU that computes in it, and float32 elsewhere: on a CPU float32 is the
    stable choice, and the faster one for small models. Raises ConfigError for float16 under
    DeepSpeed and FSDP.
    """
    if dtype == "float16" and is_sharded(environment):
        raise ConfigError(
            "--dtype float16: expected one process or DDP, found DeepSpeed or FSDP, which scale "
            "the loss in ways of their own. Take --dtype bfloat16."
        )
    if dtype == "auto":
        device = this_device(environment)
        is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE
        return torch.bfloat16 if is_fast else None
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)


def is_sharded(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if DeepSpeed or FSDP will place the model, so that we must not move it."""
    engines = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    return any(is_set(environment, engine) for engine in engines)


@contextmanager
def one_pass(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Surround one forward and its backward, one of several that make up a `training_step`.

    All but the last only add to the gradients: DDP and FSDP2 do not reduce them (the forward must
    be inside too: DDP decides there), DeepSpeed does not step. `model` is the wrapped model.
    DeepSpeed and FSDP2 communicate in every pass, so all ranks must run the same number of them.
    """
    if last:
        yield
        return
    state = accelerator.gradient_state
    due = state.sync_gradients
    # DeepSpeed refuses its own no_sync from stage 2 on, and needs none below.
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    state._set_sync_gradients(False)
    try:
        with nullcontext() if is_deepspeed else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(due)


class World(NamedTuple):
    """This process's place: number `rank` of `processes`, on one engine.

    The engine is "none", "DDP", "FSDP" or one of DEEPSPEED.
    """

    processes: int
    rank: int
    engine: str

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.processes}, engine {self.engine}"


def asked_world(environment: Mapping[str, str]) -> World:
    """Read what the launcher asked for through these environment variables."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    engine = "DDP" if processes > 1 else "none"
    if is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        engine = f"ZeRO-{stage}" if stage else "DeepSpeed"
    elif is_set(environment, "ACCELERATE_USE_FSDP"):
        engine = "FSDP"
    return World(processes, int(environment.get("RANK", "0")), engine)


def start_ranks(timeout_seconds: float) -> None:
    """Let the ranks of a launch find each other, with this timeout for all that they do.

    transformers passes its `ddp_timeout` on to GPUs only. Where the launcher has replaced ranks
    (`--max_restarts`), torch gives the new ones the store of the old, with the old ones' addresses
    in it: they are told apart here, on one machine, where all ranks count the same restarts.
    """
    asked, environment = asked_world(os.environ), os.environ
    if asked.processes == 1:
        return
    on_cpu, timeout = this_device().type == "cpu", timedelta(seconds=timeout_seconds)
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]:
        place = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = dist.PrefixStore(f"restart_{restarts}", dist.TCPStore(*place, timeout=timeout))
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            store=store,
            rank=asked.rank,
            world_size=asked.processes,
            timeout=timeout,
        )
    if on_cpu:
        PartialState(cpu=True, backend=None, timeout=timeout)


def settle_use_cpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Settle `use_cpu` of TrainingArguments, and whether this launch can work at all.

    Without an accelerator `use_cpu` must be True, or a second rank would not know of the first. On
    the CPU this also tells DeepSpeed so, and spares it the compilation of an op that training does
    not use. Raises ConfigError for a launch that accelerate would quietly turn into another one.
    """
    _refuse_lost_ranks(environment)
    cpu_flag = is_set(environment, "ACCELERATE_USE_CPU")
    use_cpu = this_device(environment).type == "cpu"
    engine = asked_world(environment).engine
    if engine == "FSDP" and use_cpu:
        raise ConfigError(
            "FSDP was asked for, but accelerate drops it on the CPU, which is all there is to use "
            f"here. Start with: {CONFIGS.format('zero3')}"
        )
    if engine in DEEPSPEED and cpu_flag:
        raise ConfigError(
            f"{engine} and ACCELERATE_USE_CPU were both asked for, and the second makes "
            "accelerate drop the first. Unset ACCELERATE_USE_CPU (--cpu, use_cpu: true); "
            "without a GPU the CPU is used anyway."
        )
    if use_cpu:
        # accelerate imports DeepSpeed wherever it is installed, which warns unless it is told.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if engine in DEEPSPEED:
            _skip_unused_deepspeed_build()
    return use_cpu


def assert_world_as_asked(
    accelerator: Accelerator, environment: Mapping[str, str] = os.environ
) -> None:
    """Raise ConfigError unless accelerate set up the ranks and the engine that were asked for."""
    asked = asked_world(environment)
    found = found_world(accelerator)
    if asked.engine == "DeepSpeed" and found.engine in DEEPSPEED:
        asked = asked._replace(engine=found.engine)
    if asked == found:
        return
    raise ConfigError(
        f"asked for {asked} (WORLD_SIZE, RANK and ACCELERATE_USE_… in the environment), but "
        f"accelerate set up {found}. Ranks that do not know of each other would train apart and "
        "overwrite each other's files. Without a GPU, TrainingArguments need use_cpu=True and the "
        "environment no ACCELERATE_USE_CPU; several ranks start with: "
        f"{CONFIGS.format('ddp')} --num_processes {max(asked.processes, 2)}"
    )


def assert_engine_in_place(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise ConfigError unless the model about to be trained is wrapped by the engine asked for.

    `model` is the trainer's `model_wrapped` at the start of training. accelerate takes a model
    that it prepared for evaluation as prepared for training, without DDP: ranks would diverge.
    """
    found = found_world(accelerator)
    if found.engine == "DDP":
        wrapped = isinstance(model, DistributedDataParallel)
    elif found.engine in DEEPSPEED:
        stage = getattr(model, "zero_optimization_stage", lambda: None)()
        wrapped = found.engine == f"ZeRO-{stage}"
    elif found.engine == "FSDP":
        wrapped = type(model).__name__.startswith("FSDP")
    else:
        wrapped = True
    if not wrapped:
        raise ConfigError(
            f"the run has {found.processes} ranks with {found.engine}, but the model is a bare "
            f"{type(model).__name__}: gradients would not be shared. Was it prepared for "
            "evaluation before train()? Use eval_on_start, or evaluate after training."
        )


def found_world(accelerator: Accelerator) -> World:
    """Return the place and engine that accelerate has set up."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        engine = f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    elif kind == DistributedType.FSDP:
        engine = "FSDP"
    else:  # torchrun with one rank is none, too
        engine = "none" if accelerator.num_processes == 1 else "DDP"
    return World(accelerator.num_processes, accelerator.process_index, engine)


def _refuse_lost_ranks(environment: Mapping[str, str]) -> None:
    """Refuse the trace of `accelerate launch --cpu --num_processes 2`, which starts one process."""
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "WORLD_SIZE" not in environment
    if launched and "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        raise ConfigError(
            "several processes were asked for, but accelerate launch started one: that is what it "
            "does for --cpu and MULTI_CPU. Start CPU ranks with: "
            f"{CONFIGS.format('ddp')} --num_processes 2. For one process, unset MASTER_ADDR."
        )


def _skip_unused_deepspeed_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce, which only its inference uses.

    On CPUs it compiles the op with ninja and g++ as soon as it is initialised, and a build that
    was killed leaves a lock that hangs every later run. Training communicates through gloo.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all_ranks(mine: T) -> list[T]:
    """Gather every rank's object, in the order of ranks. A collective: every rank must call it."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    everyone: list[T] = [mine] * world
    dist.all_gather_object(everyone, mine)
    return everyone


def any_rank(condition: bool) -> bool:
    """Return True if the condition holds on any rank. A collective: every rank must call it."""
    return any(from_all_ranks(condition))


def wait_for_all() -> None:
    """Wait until every rank of the run has come here; alone, a process goes on."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `path` if the block ends well, and else vanishes.

    An earlier folder at `path` stays until then. With several processes all enter, all get the
    same folder (sharded saves write from every rank), and the main process renames it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    try:
        yield partial
    except BaseException:
        # No waiting here: other ranks may be anywhere, and the launcher stops them.
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    wait_for_all()
    if is_main_process():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    wait_for_all()


@contextmanager
def making_no_folder(args: TrainingArguments) -> Iterator[None]:
    """Inside, transformers makes the folder of checkpoints; take it away until the first one."""
    folder = Path(args.output_dir)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    yield
    for path in missing if args.should_save else ():
        with suppress(OSError):  # it is not empty any more
            path.rmdir()


# What a run was made on.

PACKAGES = ("posttrain", "torch", "transformers", "accelerate", "peft", "datasets", "trl")
OPTIONAL_PACKAGES = ("deepspeed", "bitsandbytes", "vllm", "flash_attn")


def describe_environment() -> dict[str, Any]:
    """Collect what another person needs to run this again: command, versions, machine."""
    on_gpu = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {name: _version(name) for name in PACKAGES + OPTIONAL_PACKAGES}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git": _git_commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name, version in versions.items() if version},
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus if on_gpu else [],
        "world_size": asked_world(os.environ).processes,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak_memory_gb() -> float:
    """Return the most memory that this process has held so far: of its GPU, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if (status := Path("/proc/self/status")).is_file():  # ru_maxrss begins with the parent's peak
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cpu_name() -> str:
    """Return what this machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit(root: Path) -> str | None:
    """The commit of this checkout, `-dirty` when files differ; None when it is not a checkout."""
    if not (root / ".git").exists():
        return None
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")  # a tag is no commit
    command = ["git", "-C", str(root), "describe", *options]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() or None
    return None
