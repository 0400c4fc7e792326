"""Chat templates of real models, as TRL ships them: the ids trained on are those of inference.

Each tokenizer is made here, with the special tokens that the template writes and merges learnt from
its text.
"""

import functools
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data import load_documents, load_pairs, load_prompts, marks
from posttrain.errors import DataError

chat_template_utils = pytest.importorskip("trl.chat_template_utils")

SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|?>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|<\|?(?:turn|channel)\|?>"
)
CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 1}}}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": '{"sum": "é 3"}'}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"name": "add", "description": "Adds one.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": ADD}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **others):
    return {"role": "assistant", "content": text, **others}


PLAIN = [user("1+1?"), assistant("It is 2."), user("2+2?"), assistant(" It is\n\n4.\n")]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN]
THINKING = [
    user("1+1?"),
    assistant("<think>\nOne more.\n</think>\n\nIt is 2."),
    user("2+2?"),
    assistant("<think>\nTwice two.\n</think>\n\nIt is 4."),
]
REASONING = [
    user("1+1?"),
    assistant("It is 2.", reasoning_content="One more."),
    user("2+2?"),
    assistant("It is 4.", reasoning_content="Twice two."),
]
CALLING = [user("1+2?"), assistant("", tool_calls=[CALL]), RESULT, assistant("It is 3.")]
THINKING_CALL = assistant("", tool_calls=[CALL], reasoning_content="A tool.")
THINKING_CALLING = [
    *REASONING[:2],
    user("1+2?"),
    THINKING_CALL,
    RESULT,
    assistant("It is 3.", reasoning_content="Easy."),
]
CONVERSATIONS = {
    "plain": PLAIN,
    "system": SYSTEM,
    "thinking": THINKING,
    "reasoning": REASONING,
    "calling": CALLING,
    "thinking+calling": THINKING_CALLING,
}
ALL = tuple(CONVERSATIONS)
NO_TOOLS = ("plain", "system", "thinking", "reasoning")
SERVES = {
    "cohere": NO_TOOLS,
    "cohere2": NO_TOOLS,
    "deepseek_r1_distill": ("thinking",),
    "gemma": ("plain", "thinking", "reasoning"),
    "gemma3": NO_TOOLS,
    "gemma4_v5": ALL,
    "glm4moe": ALL,
    "gptoss": ALL,
    "lfm2_2_5_v2": ALL,
    "llama3": NO_TOOLS,
    "llama3_1": ALL,
    "llama3_2": ALL,
    "nemotron_3_nano": ("thinking", "reasoning", "thinking+calling"),
    "phi3": NO_TOOLS,
    "phi3_5": NO_TOOLS,
    "qwen2_5": ALL,
    "qwen3": ALL,
    "qwen3_5_think": ALL,
    "qwen3_instruct_2507": ALL,
}
of_each_template = pytest.mark.parametrize("name", SERVES)


def tokenizer_of(name):
    """A tokenizer with TRL's copy of a model's template; skipped where this TRL has none."""
    source = getattr(chat_template_utils, f"{name}_chat_template", None)
    if source is None:
        pytest.skip(f"this TRL has no template {name}")
    return make_tokenizer_for(source)


@functools.cache
def make_tokenizer_for(source):
    special = sorted({*SPECIAL.findall(source), "<bos>", "<eos>"})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 200,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([source, "It is 2. It is 4."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = source
    return tokenizer


@functools.cache
def documents_of(name, kind):
    """The documents of a conversation, loaded once for all claims about them."""
    silent = [].append
    return load_documents([row_of(kind)], tokenizer_of(name), max_length=10_000, say=silent)[:]


def each_document(name, kind):
    columns = documents_of(name, kind)
    for ids, trained in zip(columns["input_ids"], columns["trained"], strict=True):
        yield {"input_ids": ids, "trained": trained}


def row_of(kind):
    row = {"messages": CONVERSATIONS[kind]}
    return row | {"tools": TOOLS} if "calling" in kind else row


def at_inference(tokenizer, turns, tools):
    """The ids of the prompt that the model is given to continue."""
    return tokenizer.apply_chat_template(
        turns, tools=tools, add_generation_prompt=True, return_dict=False
    )


def targets(document):
    """(ids before, ids trained) of each run of targets."""
    ids, trained = document["input_ids"], document["trained"]
    starts = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
    ends = [
        i for i in range(1, len(ids) + 1) if trained[i - 1] and (i == len(ids) or not trained[i])
    ]
    return [(ids[:start], ids[start:end]) for start, end in zip(starts, ends, strict=True)]


@of_each_template
def test_each_answer_is_trained_behind_the_ids_of_its_prompt_at_inference(name):
    """And nothing else is trained: as many runs of targets as assistant turns, one after each."""
    tokenizer, wrong = tokenizer_of(name), []
    for kind in SERVES[name]:
        row = row_of(kind)
        turns = row["messages"]
        runs = [run for document in each_document(name, kind) for run in targets(document)]
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        prompts = [at_inference(tokenizer, turns[:place], row.get("tools")) for place in places]
        wrong += [(kind, "prompts")] * ([before for before, _ in runs] != prompts)
        for place, (_, answer) in zip(places, runs, strict=False):
            problem = problem_of_answer(tokenizer, turns[place], answer)
            wrong += [(kind, place, problem)] * bool(problem)
    assert wrong == []


def problem_of_answer(tokenizer, turn, answer):
    """The claim about the trained ids of a turn that does not hold; empty if all do."""
    text = tokenizer.decode(answer)
    words = turn["content"].split("</think>")[-1] or "add"
    if words.strip() not in text:
        return f"without its words: {text!r}"
    if not tokenizer.added_tokens_decoder[answer[-1]].special:
        return f"without what ends the turn: {text!r}"
    if any(other in text for other in ("1+1?", "2+2?", "1+2?", "é 3", "Be brief")):
        return f"with another turn's words: {text!r}"
    return ""


OTHERWISE = [("deepseek_r1_distill", "thinking"), ("gptoss", "thinking+calling")]
OTHERWISE += [("glm4moe", kind) for kind in ALL]


@of_each_template
def test_the_last_document_is_the_whole_conversation(name):
    """All of its ids, up to white space after the end of the last turn."""
    wrong, tokenizer = [], tokenizer_of(name)
    for kind in SERVES[name]:
        ids, whole = last_and_whole(name, kind)
        is_whole = ids == whole[: len(ids)] and not tokenizer.decode(whole[len(ids) :]).strip()
        wrong += [kind] * (not is_whole and (name, kind) not in OTHERWISE)
    assert wrong == []


def test_the_last_document_ends_as_the_model_has_to_even_where_the_template_does_not():
    """GLM's turns end with the token that opens the next one."""
    ids, whole = last_and_whole("glm4moe", "plain")
    assert ids == [*whole, tokenizer_of("glm4moe").convert_tokens_to_ids("<|user|>")]


@pytest.mark.parametrize(
    ("name", "kind", "thought"),
    [(*OTHERWISE[0], "Twice two."), (*OTHERWISE[1], "A tool.")],
)
def test_the_last_document_holds_thoughts_that_the_rendered_conversation_drops(name, kind, thought):
    """R1 drops those it asked for, gpt-oss those that the prompt of the last turn holds."""
    ids, whole = (tokenizer_of(name).decode(each) for each in last_and_whole(name, kind))
    assert thought in ids
    assert thought not in whole


def last_and_whole(name, kind):
    row = row_of(kind)
    ids = documents_of(name, kind)["input_ids"][-1]
    return ids, tokenizer_of(name).apply_chat_template(
        row["messages"], tools=row.get("tools"), return_dict=False
    )


@of_each_template
def test_pairs_and_prompts_hold_the_ids_of_inference(name, quiet):
    tokenizer, wrong = tokenizer_of(name), []
    kinds = [kind for kind in SERVES[name] if kind in NO_TOOLS]
    conversations = [CONVERSATIONS[kind] for kind in kinds]
    rows = [
        {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [another_answer(turns[-1])]}
        for turns in conversations
    ]
    pairs = load_pairs(rows, tokenizer, say=quiet)
    prompts = load_prompts(rows, tokenizer, template="chat", say=quiet)
    for kind, turns, pair, prompt in zip(kinds, conversations, pairs, prompts, strict=True):
        before = at_inference(tokenizer, turns[:-1], None)
        document = before + pair["chosen_ids"]
        wrong += [kind] * (not pair["prompt_ids"] == prompt["prompt_ids"] == before)
        wrong += [kind] * (document != documents_of(name, kind)["input_ids"][-1])
    assert wrong == []


def another_answer(turn):
    return {**turn, "content": turn["content"].replace("It is", "Perhaps")}


def test_the_claims_can_fail(quiet):
    """Qwen3 in one document, as its text is rendered, has no prompt of inference for turn 2."""
    tokenizer = tokenizer_of("qwen3")
    whole = tokenizer.apply_chat_template(THINKING, return_dict=False)
    prompt = at_inference(tokenizer, THINKING[:1], None)
    first = load_documents([{"messages": THINKING[:2]}], tokenizer, say=quiet)[0]["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert whole[: len(first)] != first
    assert "One more." not in tokenizer.decode(whole)


def test_thinking_is_kept_where_it_is_generated_and_dropped_from_the_turns_before(quiet):
    documents = load_documents([{"messages": THINKING}], tokenizer_of("qwen3"), say=quiet)
    first, second = (tokenizer_of("qwen3").decode(each["input_ids"]) for each in documents)
    assert "One more." in first
    assert ("One more." in second, "Twice two." in second) == (False, True)
    assert "1 made into several documents" in quiet.lines[0]


def test_thinking_between_tool_calls_stays_in_one_document(quiet):
    documents = load_documents(
        [row_of("thinking+calling")], tokenizer_of("qwen3"), max_length=10_000, say=quiet
    )
    texts = [tokenizer_of("qwen3").decode(each["input_ids"]) for each in documents]
    assert len(texts) == 2
    assert texts[1].count("A tool.") == texts[1].count("Easy.") == 1
    assert "One more." not in texts[1]


@pytest.mark.parametrize("name", ["gemma3", "llama3", "phi3", "qwen2_5", "qwen3"])
def test_marks_of_trl_and_rendered_turns_agree(name, quiet, monkeypatch):
    tokenizer = tokenizer_of(name)
    rows = [{"messages": PLAIN}, {"messages": THINKING}]
    with_marks = load_documents(rows, tokenizer, say=quiet)
    monkeypatch.setattr(marks, "_trl_lookup", lambda: None)
    without = load_documents(rows, tokenizer, say=quiet)
    assert with_marks[:] == without[:]
    assert "4 by the marks of TRL's training template" in quiet.lines[0]
    assert "4 by what it adds to its prompt" in quiet.lines[2]


def test_without_trl_a_template_without_any_end_gets_the_tokenizers_own(quiet, monkeypatch):
    monkeypatch.setattr(marks, "_trl_lookup", lambda: None)
    tokenizer = tokenizer_of("glm4moe")
    documents = load_documents([{"messages": PLAIN}], tokenizer, say=quiet)
    ends = [tokenizer.decode(answer)[-5:] for each in documents for _, answer in targets(each)]
    assert ends == ["<eos>", "<eos>"]


@pytest.mark.parametrize(
    ("name", "kind"), [("deepseek_r1_distill", "plain"), ("nemotron_3_nano", "plain")]
)
def test_answers_without_the_thinking_that_the_template_opens_are_refused(name, kind, quiet):
    with pytest.raises(DataError, match=r"row 1: the prompt is no prefix .* at turn 2 .*<think>"):
        load_documents([row_of(kind)], tokenizer_of(name), say=quiet)


def test_thinking_switched_off_by_the_row_serves_such_a_template(quiet):
    row = {"messages": PLAIN, "chat_template_kwargs": {"enable_thinking": False}}
    tokenizer = tokenizer_of("nemotron_3_nano")
    documents = load_documents([row], tokenizer, say=quiet)
    assert [tokenizer.decode(answer) for each in documents for _, answer in targets(each)] == [
        "It is 2.<|im_end|>",
        " It is\n\n4.<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["gemma3", "llama3", "phi3", "cohere2"])
def test_templates_that_leave_out_tool_calls_are_refused(name, quiet):
    message = (
        "row 1: the (chat template leaves out the call of 'add' in turn 2|.* refuses the turns)"
    )
    with pytest.raises(DataError, match=message):
        load_documents([row_of("calling")], tokenizer_of(name), say=quiet)


@pytest.mark.parametrize("name", ["gemma3", "llama3", "phi3"])
def test_templates_that_leave_out_tools_are_refused(name, quiet):
    row = {"messages": PLAIN, "tools": TOOLS}
    with pytest.raises(DataError, match="row 1: the chat template leaves out the column tools"):
        load_documents([row], tokenizer_of(name), say=quiet)
