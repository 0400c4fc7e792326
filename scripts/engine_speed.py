"""Tokens a second of vLLM and of the decode loop, float32, at 1, 8 and 32 rows: one line of JSON.

python scripts/engine_speed.py MODEL    # in the environment that scripts/engines.py makes
"""

import json
import os
import sys
import time

ROWS, NEW_TOKENS, ROUNDS = (1, 8, 32), 64, 3
PROMPT = "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many?"
# One process, as a trainer's engine runs; its threads are not bound to cores.
SETTINGS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29611", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip


def main(model: str) -> dict[int, dict[str, list[float]]]:
    """Return the rates of each engine by the number of rows, in alternation."""
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    from posttrain.models.load import load_for_inference, load_tokenizer
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.sampling import Sampling
    from posttrain.run.settings import ModelConfig

    engine = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=512, gpu_memory_utilization=0.1,
        distributed_executor_backend="external_launcher", enable_prefix_caching=False,
    )  # fmt: skip
    loop = HFGenerator(load_for_inference(ModelConfig(model_name_or_path=model, dtype="float32")))
    ids = load_tokenizer(model)(PROMPT)["input_ids"]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)

    def by_vllm(count: int) -> None:
        prompts = [{"prompt_token_ids": ids}] * count
        engine.generate(prompts, sampling, use_tqdm=False)

    def by_loop(count: int) -> None:
        loop.generate([ids] * count, Sampling(NEW_TOKENS, ()), 1)

    found: dict[int, dict[str, list[float]]] = {}
    for count in ROWS:
        rates: dict[str, list[float]] = {"vllm": [], "loop": []}
        for measured in range(ROUNDS + 1):
            for name, generate in (("vllm", by_vllm), ("loop", by_loop)):
                start = time.perf_counter()
                generate(count)
                if measured:  # the first round warms up
                    rates[name].append(count * NEW_TOKENS / (time.perf_counter() - start))
        found[count] = rates
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
