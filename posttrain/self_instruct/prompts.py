"""Prompts: the texts that a teacher is sent. The forms are the papers', the words are ours.

tasks_prompt(random.sample(seeds, 3), total=20)
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.self_instruct.tasks import Task

NO_INPUT = "<noinput>"

TASKS = """\
We are putting together {total} tasks that show how widely a language model can be useful. Each \
task has an instruction, an input that it may need, and the output that a very good assistant \
would give.

What the list should be like:
- Varied in its verbs: an instruction opens in a way that no other one does.
- Varied in kind: open questions, classification, rewriting, extracting, planning, explaining, \
calculating, small pieces of code, stories, letters, and what else people ask for. Questions and \
commands both appear.
- Varied in subject: home, work, science, history, health, law, nature, art, sport, feelings.
- Possible in text alone: nothing to be seen, heard, opened, sent or done in the world, and no \
knowledge of today's date or news.
- In English, each instruction one or two sentences long.
- The input is real material with concrete content, never a placeholder, and at most 100 words. A \
task that needs none has {no_input} there.
- The output is correct, complete and to the point, and mostly under 100 words.

Every field carries the number of its task, and ### stands between tasks. The first {shown} are \
given; continue with task {next_number} and go on to task {total}.

{examples}
###
"""

INSTRUCTIONS = """\
Below is the beginning of a list of {total} tasks for a language model. They differ in subject, \
in form and in what has to be done, and each can be carried out in text alone. Continue the list \
from number {next_number} to number {total}, one task to a line, each line beginning with its \
number. Write the tasks only, no answers.

{examples}
"""

TYPE = """\
A classification task is one whose output is one of a few labels that are fixed in advance. Say \
for the last task below whether it is a classification task. Answer Yes or No.

{examples}

Task: {instruction}
Classification:"""

INPUT_FIRST = """\
Make up to {most} examples for the last task below: an input, then the output that is right for \
it. Inputs differ from each other. If the task needs no input, write {no_input} and give one \
example only. Keep to the form of the tasks before.

{examples}

Task: {instruction}"""

LABEL_FIRST = """\
Make up to {most} examples for the last task below, which has a few possible labels. Write the \
label first, then an input to which that label belongs, so that different labels appear. Keep to \
the form of the tasks before.

{examples}

Task: {instruction}"""


def tasks_prompt(shown: Sequence[Task], *, total: int) -> str:
    """Alpaca's request: `shown` are tasks 1, 2, …; the teacher writes the rest up to `total`."""
    examples = [
        f"###\n{i}. Instruction: {task.instruction}\n{i}. Input:\n{task.input or NO_INPUT}\n"
        f"{i}. Output:\n{task.output}"
        for i, task in enumerate(shown, start=1)
    ]
    return TASKS.format(
        total=total,
        shown=len(shown),
        next_number=len(shown) + 1,
        no_input=NO_INPUT,
        examples="\n".join(examples),
    )


def instructions_prompt(shown: Sequence[str], *, total: int) -> str:
    """Self-Instruct's request for instructions, after those shown."""
    lines = [f"{i}. {' '.join(text.split())}" for i, text in enumerate(shown, start=1)]
    return INSTRUCTIONS.format(total=total, next_number=len(shown) + 1, examples="\n".join(lines))


def type_prompt(instruction: str, examples: Sequence[Task]) -> str:
    """Self-Instruct's question whether an instruction is a classification, after examples."""
    lines = [
        f"Task: {task.instruction}\nClassification: {'Yes' if task.is_classification else 'No'}"
        for task in examples
    ]
    return TYPE.format(examples="\n\n".join(lines), instruction=instruction)


def instances_prompt(
    instruction: str, examples: Sequence[Task], *, is_classification: bool, most: int
) -> str:
    """Self-Instruct's request for instances: label first for a classification, else input first."""
    template = LABEL_FIRST if is_classification else INPUT_FIRST
    shown = []
    for task in examples:
        fields = f"Input: {task.input or NO_INPUT}\nOutput: {task.output}"
        if is_classification:
            fields = f"Label: {task.output}\nInput: {task.input or NO_INPUT}"
        shown.append(f"Task: {task.instruction}\nExample 1\n{fields}")
    return template.format(
        most=most, no_input=NO_INPUT, examples="\n\n".join(shown), instruction=instruction
    )
