"""What the ranks of these tests run: functions of a rank whose results pickle."""

import os
import time

import torch

VOCABULARY, ROW_TOKENS, ROWS_PER_STEP, STEPS = 64, 8, 8, 3


def place(rank: int) -> dict:
    """Where this process believes it is."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_DEEPSPEED_ZERO_STAGE")
    return {"rank": rank, **{name: os.environ.get(name) for name in names}}


def fail_on_rank_one(rank: int) -> None:
    """Rank 1 raises, rank 0 waits for it as a collective would."""
    if rank == 1:
        raise ValueError("the reward column is missing")
    time.sleep(60)


def hang(rank: int) -> None:
    """Neither rank comes back."""
    time.sleep(60 + rank)


def tiny_llama() -> torch.nn.Module:
    """The same random weights in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes))


def rows() -> list[dict]:
    """Random rows for STEPS steps, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS_PER_STEP * STEPS, ROW_TOKENS), generator=generator)
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]


def training_arguments(folder: str, **changes: object) -> object:
    """STEPS steps of ROWS_PER_STEP rows over all ranks, on the device of this machine."""
    from posttrain.run.engine import settle_use_cpu
    from tests.trainers.tiny import arguments

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "use_cpu": settle_use_cpu(),
        "per_device_train_batch_size": ROWS_PER_STEP // world_size,
        "per_device_eval_batch_size": 2,
        "max_steps": STEPS,
    }
    return arguments(folder, **{**settings, **changes})


def train(rank: int, *, folder: str, passes: tuple[int, ...]) -> dict:
    """Train in `passes[rank]` passes a step, generating before each; what came of it."""
    from split_trainer import SplitTrainer

    from posttrain.run.engine import assert_engine_in_place, assert_world_as_asked

    args = training_arguments(folder)
    trainer = SplitTrainer(tiny_llama(), args, train_dataset=rows(), passes=passes[rank])
    assert_world_as_asked(trainer.accelerator)
    if trainer.is_deepspeed_enabled:
        # Nothing in a tiny model is over the size from which ZeRO-3 lets go of a parameter.
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    trainer.train()
    assert_engine_in_place(trainer.accelerator, trainer.model_wrapped)
    trainer.save_model(folder)
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    engine = trainer.model_wrapped
    return {
        "engine": type(engine).__name__,
        "stage": getattr(engine, "zero_optimization_stage", lambda: None)(),
        "backend": torch.distributed.is_initialized() and torch.distributed.get_backend(),
        "rank": trainer.accelerator.process_index,
        "processes": trainer.accelerator.num_processes,
        "held": (weight.numel(), weight.ds_tensor.numel())
        if hasattr(weight, "ds_tensor")
        else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "samples": trainer.samples,
    }


def build_without_use_cpu(rank: int, *, folder: str) -> str:
    """The ConfigError of a trainer whose arguments do not say use_cpu."""
    from transformers import Trainer

    from posttrain.errors import ConfigError
    from posttrain.run.engine import assert_world_as_asked

    trainer = Trainer(tiny_llama(), training_arguments(folder, use_cpu=False))
    try:
        assert_world_as_asked(trainer.accelerator)
    except ConfigError as error:
        return str(error)
    return f"rank {rank} was accepted"


def evaluate_then_train(rank: int, *, folder: str) -> dict:
    """transformers' Trainer, evaluated before it trains: the ranks' weights and our guard."""
    from transformers import Trainer

    from posttrain.errors import ConfigError
    from posttrain.run.engine import assert_engine_in_place

    args = training_arguments(folder)
    trainer = Trainer(tiny_llama(), args, train_dataset=rows(), eval_dataset=rows()[:4])
    trainer.evaluate()
    trainer.train()
    try:
        assert_engine_in_place(trainer.accelerator, trainer.model_wrapped)
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = f"rank {rank} was accepted"
    return {"refusal": refusal, "weight": trainer.model.lm_head.weight.detach()}


def restarted(rank: int) -> list:
    """What ranks tell each other whose launcher started them anew and kept its store.

    Rank 1 is late, so rank 0 would find the address that rank 1 had before.
    """
    from datetime import timedelta

    import torch.distributed as dist

    from posttrain.run.engine import from_all_ranks, start_ranks

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launchers = dist.TCPStore(*address, is_master=rank == 0, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    found = []
    for attempt in ("0", "1"):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = attempt
        if attempt == "0":
            dist.init_process_group("gloo", timeout=timedelta(seconds=20))
        else:
            time.sleep(rank)
            start_ranks(20)
        found.append(from_all_ranks((attempt, rank)))
        launchers.set(f"heard in {attempt} by {rank}", "")
        launchers.wait([f"heard in {attempt} by {other}" for other in (0, 1)])
        dist.destroy_process_group()
    return found
