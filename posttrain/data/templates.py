"""Prompt templates: functions from an example to the text that the answer follows.

`TEMPLATES` is the one table. A template without a name is passed as a function. None ends in a
newline or space: the answer's first token follows directly. Chat templates belong to the tokenizer
and are rendered in chat.py.
"""

from collections.abc import Callable

from posttrain.data.examples import Example, with_input

PromptTemplate = Callable[[Example], str]

# Stanford Alpaca's two training prompts, to the letter: models trained on others' copies of this
# data expect them.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)

# DeepSeek-R1-Zero's four statements (arXiv 2501.12948, Table 1) in words of our own.
R1_ZERO = (
    "This is a conversation between a User and an Assistant. The User asks a question and the "
    "Assistant solves it. The Assistant first reasons in its mind, step by step, and only then "
    "tells the User the answer. It writes the reasoning within <think> </think> and the answer "
    "within <answer> </answer>, like this: <think> reasoning here </think> "
    "<answer> answer here </answer>.\nUser: {question}\nAssistant:"
)


def alpaca_prompt(example: Example) -> str:
    if example.input:
        # With an input, `turns` holds the instruction alone.
        return ALPACA_WITH_INPUT.format(instruction=example.instruction, input=example.input)
    return ALPACA_WITHOUT_INPUT.format(instruction=example.instruction)


def r1_zero_prompt(example: Example) -> str:
    return R1_ZERO.format(question=with_input(example.instruction, example.input))


def r1_zero_think_prompt(example: Example) -> str:
    """R1-Zero with the opening tag given: a format reward has to put `<think>` back first."""
    return r1_zero_prompt(example) + " <think>"


def plain_prompt(example: Example) -> str:
    """The prompt as it stands in the file; messages as "\\n\\nHuman: ...\\n\\nAssistant:"."""
    if example.texts is not None:
        return example.texts[0]
    return "".join(map(plain_turn, example.turns)) + "\n\nAssistant:"


def plain_turn(turn: dict[str, str]) -> str:
    speaker = {"user": "Human", "assistant": "Assistant"}.get(turn["role"], turn["role"].title())
    return f"\n\n{speaker}: {turn['content']}"


TEMPLATES: dict[str, PromptTemplate] = {
    "alpaca": alpaca_prompt,
    "r1_zero": r1_zero_prompt,
    "r1_zero_think": r1_zero_think_prompt,
    "plain": plain_prompt,
}
