"""The experts that a mixture chose for the tokens of completions, kept beside them.

with RoutingRecorder(model) as record:
    record.begin(lengths, owners, max_tokens)     # after the packed pass over the prompts
    record.keep(rows, step)                       # after each token
    completions = record.given_to(completions)    # Completion.experts, .prompt_experts
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.packed.replay import Recorder
from posttrain.rollouts.sampling import Completion


class RoutingRecorder(Recorder):
    """Records the routers of a model that generates."""

    def begin(self, lengths: Sequence[int], owners: Sequence[int], max_tokens: int) -> None:
        """Take the packed prompts' choices, and make room for (R, max_tokens) tokens.

        lengths: tokens of each prompt. owners: the prompt of each row.
        """
        found = self.forwards.pop()  # (N, C)
        parts = found.cpu().split(list(lengths))
        self.prompts = [parts[index] for index in owners]
        self.experts = found.new_full((len(owners), max_tokens, found.shape[1]), -1)

    def keep(self, rows: Tensor, step: int) -> None:
        """Take the choices for token `step` of these rows, which was the last forward's."""
        self.experts[rows, step] = self.forwards.pop()

    def given_to(self, completions: list[Completion]) -> list[Completion]:
        """Give completions, one for each row, their experts, and return them."""
        return _given(completions, self.prompts, self.experts)

    def given_to_rows(self, completions: list[Completion], length: int) -> list[Completion]:
        """The same where every forward had the next tokens of all rows, `length` prompt tokens each
        at first."""
        steps = [found.view(len(completions), -1, found.shape[1]) for found in self.forwards]
        self.forwards.clear()
        prompts, experts = torch.cat(steps, 1).cpu().tensor_split([length], 1)
        return _given(completions, prompts, experts)


def _given(
    completions: list[Completion], prompts: Sequence[Tensor], experts: Tensor
) -> list[Completion]:
    for completion, prompt, rows in zip(completions, prompts, experts.cpu(), strict=True):
        num_fed = len(completion.token_ids) - 1
        last = rows.new_full((1, rows.shape[1]), -1)
        completion.prompt_experts, completion.experts = prompt, torch.cat((rows[:num_fed], last))
    return completions
