"""Whether a template and its mask do on these rows what training needs: counts over all tokens."""

from array import array
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.encoding import Encoder
from posttrain.data.examples import Example
from posttrain.data.formats import DOCUMENTS, PROMPTS, Format
from posttrain.data.rendering import choose_template
from posttrain.data.summary import quantiles
from posttrain.errors import DataError

BLOCK_EXAMPLES = 1024  # tokenised in one call


@dataclass
class TokenReport:
    """lengths: (median, 95th percentile, longest) in tokens, before any limit.

    num_trained of num_tokens are targets; num_untrained documents have none within max_length, and
    num_unended none that is an end-of-sequence or end-of-turn token. refused: rows that the
    template cannot render, and the message of the first.
    """

    template: str = ""
    max_length: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    num_too_long: int = 0
    num_untrained: int = 0
    num_unended: int = 0
    num_refused: int = 0
    refused: str = ""
    lengths: tuple[int, int, int] = (0, 0, 0)
    breaks: list[str] = field(default_factory=list)


class TokenChecks:
    """Takes examples one by one; `finished` gives the report."""

    def __init__(self, tokenizer: Any, *, template: str, max_length: int) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.encoder = Encoder(tokenizer)
        self.report = TokenReport(max_length=max_length)
        self.lengths = array("q")
        self.renderers: dict[tuple[str, str], Any] = {}
        self.waiting: dict[tuple[str, str], list[Any]] = {}

    def add(self, example: Example, entry: Format, need: str) -> None:
        kind = (entry.name, need)
        if kind not in self.renderers:
            default = "r1_zero" if need == PROMPTS else "alpaca"
            self.renderers[kind] = choose_template(
                self.template, self.tokenizer, entry, default=default
            )
            self.report.template = self.renderers[kind].name
        try:
            rendered = _rendered(self.renderers[kind], example, need)
        except DataError as error:
            self.report.num_refused += 1
            self.report.refused = self.report.refused or str(error)
            return
        waiting = self.waiting.setdefault(kind, [])
        waiting += rendered
        if len(waiting) >= BLOCK_EXAMPLES:
            self._encode(kind)

    def finished(self) -> TokenReport:
        for kind in list(self.waiting):
            self._encode(kind)
        report = self.report
        if self.lengths:
            report.lengths = quantiles(self.lengths)
        report.breaks = self._breaks()
        return report

    def _encode(self, kind: tuple[str, str]) -> None:
        rendered, self.waiting[kind] = self.waiting[kind], []
        adds_bos = self.renderers[kind].adds_bos
        if not rendered:
            return
        if kind[1] == DOCUMENTS:
            for ids, trained in self.encoder.documents(rendered, add_bos=adds_bos):
                self._count_document(ids, trained)
            return
        prompts = self.encoder.prompts([prompt for prompt, _ in rendered], add_bos=adds_bos)
        answers = iter(self.encoder.answers([text for _, texts in rendered for text in texts]))
        for prompt, (_, texts) in zip(prompts, rendered, strict=True):
            lengths = [len(next(answers)) for _ in texts]
            self._count(len(prompt) + max(lengths, default=0), sum(lengths))

    def _count_document(self, ids: list[int], trained: list[bool]) -> None:
        self._count(len(ids), sum(trained))
        within = list(zip(ids, trained, strict=True))[: self.report.max_length]
        targets = {token for token, is_trained in within if is_trained}
        self.report.num_untrained += not targets
        self.report.num_unended += self.encoder.end_ids.isdisjoint(targets)

    def _count(self, length: int, num_trained: int) -> None:
        self.lengths.append(length)
        self.report.num_examples += 1
        self.report.num_tokens += length
        self.report.num_trained += num_trained
        self.report.num_too_long += length > self.report.max_length

    def _breaks(self) -> list[str]:
        report, found = self.report, []
        if report.num_refused:
            found.append(f"{report.num_refused:,} rows cannot be rendered: {report.refused}")
        whole = report.num_examples
        if whole and report.num_untrained == whole:
            found.append("The mask covers no token of any document within max_length.")
        elif whole and report.num_unended == whole:
            found.append(
                "No document has an end-of-sequence token among its targets within max_length: "
                "the model could not learn to stop."
            )
        documents = {DOCUMENTS} == {need for _, need in self.renderers}
        if whole and report.num_too_long == whole and not documents:
            found.append(f"Every example is longer than {report.max_length:,} tokens.")
        return found


def _rendered(renderer: Any, example: Example, need: str) -> list[Any]:
    if need == DOCUMENTS:
        return renderer.documents(example)
    answers = [] if need == PROMPTS else renderer.answers(example)
    return [(renderer.prompt(example), answers)]
