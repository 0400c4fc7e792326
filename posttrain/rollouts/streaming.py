"""One completion, token by token as it is sampled.

    for token in stream(model, prompt_ids, sampling, seed=0):
        …

The tokens are those that HFGenerator gives for this prompt and seed: the same prefill, the same
random numbers, the same steps. A model that the decode loop cannot serve is completed first, and
its tokens then come at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from posttrain.packed.forward import check_context, in_evaluation
from posttrain.rollouts.generator import Decoding, HFGenerator, way_to_generate
from posttrain.rollouts.sampling import Sampling, choose, uniforms


class StreamedDecoding(Decoding):
    """A decoding of one row that hands out each token before it computes the next."""

    def tokens(self, noise: Tensor) -> Iterator[int]:
        """Yield the tokens of the completion. noise: (1, max_tokens) numbers in [0, 1)."""
        noise, last = noise.to(self.device), noise.shape[1] - 1
        for step in range(last + 1):
            token, _ = choose(self.logits, noise[:, step], self.sampling, self.stop_ids, step)
            yield token.item()
            if step == last or token.item() in self.sampling.stop_ids:
                return
            self._advance(token)


@torch.no_grad()
def stream(
    model: nn.Module, prompt: Sequence[int], sampling: Sampling, seed: int = 0
) -> Iterator[int]:
    """Yield the ids of one completion of `prompt`, the token that ends it included.

    Stop strings of `sampling` are not looked for. Raises ConfigError for a prompt that leaves no
    room in the model's context.
    """
    check_context(model, len(prompt) + sampling.max_tokens, "Lower --max_completion_length.")
    if way_to_generate(model) != "loop":
        ((completion,),) = HFGenerator(model).generate([prompt], sampling, seeds=[seed])
        yield from completion.token_ids
        return
    # Not in `fixed_weights`, and out of evaluation mode between two tokens: what is set while the
    # stream waits would hold for the caller too.
    with in_evaluation(model):
        decoding = StreamedDecoding(model, [prompt], [0], sampling, None)
    tokens = decoding.tokens(uniforms([seed], 1, sampling.max_tokens))
    while True:
        with in_evaluation(model):
            token = next(tokens, None)
        if token is None:
            return
        yield token
