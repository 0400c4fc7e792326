"""A transformers.Trainer that generates and runs several passes a step, on any engine."""

import torch
import torch.nn.functional as F
from jobs import ROW_TOKENS, ROWS_PER_STEP
from transformers import Trainer

from posttrain.rollouts.policies import whole_model
from posttrain.run.engine import one_pass


class SplitTrainer(Trainer):
    """Splits each step's rows into `passes` parts, the loss being a mean over all ranks' tokens."""

    def __init__(self, *args, passes: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.passes = passes
        self.samples: list[list[int]] = []

    def training_step(self, model, inputs, num_items_in_batch=None):  # noqa: ARG002  (transformers' signature)
        rank, world_size = self.args.process_index, self.args.world_size
        rows = inputs["input_ids"]
        # Each rank its own number of new tokens: nothing in here may wait for the other rank.
        with whole_model(self.accelerator, model) as bare, torch.no_grad():
            ids = rows[:1, :2]
            for _ in range(2 + 2 * rank):
                ids = torch.cat((ids, bare(input_ids=ids).logits[:, -1:].argmax(-1)), 1)
            self.samples.append(ids[0].tolist())
        model.train()
        scale = world_size / (ROWS_PER_STEP * (ROW_TOKENS - 1))
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        total = torch.zeros(())
        parts = rows.tensor_split(self.passes)
        for index, part in enumerate(parts):
            with one_pass(self.accelerator, model, last=index == len(parts) - 1):
                logits = model(input_ids=part).logits[:, :-1].flatten(0, 1)
                loss = F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum") * scale
                self.accelerator.backward(loss, **options)
            total += loss.detach()
        return total
