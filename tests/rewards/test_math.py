"""Which answers count as right, which rule says so, and how the reward is called."""

import asyncio
import multiprocessing
import pickle
import threading
from functools import partial

import pytest

from posttrain.maths import algebra
from posttrain.rewards import math
from posttrain.rewards.math import MAX_ANSWER_CHARS, check_golds, math_reward, verify_math
from posttrain.rewards.pieces import take_verdicts
from posttrain.workers.pool import Reply
from tests.cases import read_cases

RIGHT = read_cases(__file__, "math_right")  # pairs that a careful teacher would call right
WRONG = read_cases(__file__, "math_wrong")  # and pairs that she would call wrong, or no answer


def answered(answer):
    return f"<think>some thought</think><answer>{answer}</answer>"


def with_other_scores(cases, score):
    """The cases that do not have this score, boxed or in tags."""
    return [
        (case, verdict)
        for case in cases
        for text in (rf"\boxed{{{case['answer']}}}", answered(case["answer"]))
        if (verdict := verify_math(case["gold"], text)).score != score
    ]


def test_the_same_answer_written_differently_is_right():
    assert with_other_scores(RIGHT, 1.0) == []


def test_another_answer_or_none_is_wrong():
    assert with_other_scores(WRONG, 0.0) == []


def test_every_gold_of_the_tables_verifies_against_itself():
    assert check_golds([case["gold"] for case in RIGHT + WRONG]) == []


UNREADABLE_GOLDS = ["", "  ", "$$", "nothing follows ####", None, ["18"], "7" * 9_999]


@pytest.mark.parametrize("gold", UNREADABLE_GOLDS)
def test_an_unreadable_gold_has_no_score_and_says_so(gold):
    score, reason = verify_math(gold, answered("18"))
    assert score is None
    assert "gold cannot be read" in reason


def test_a_gold_that_no_parser_understands_is_matched_as_text_and_else_not_judged():
    gold = r"x \equiv 3 \pmod 7"
    assert verify_math(gold, r"\boxed{x \equiv 3\pmod{7}}").score == 1.0
    assert verify_math(gold, r"\boxed{x \equiv 4 \pmod 7}").score is None


@pytest.mark.parametrize(
    ("gold", "completion", "reason"),
    [
        ("18", answered("18.0"), "equal numbers"),
        ("18", answered("19"), "different numbers"),
        ("x", answered("x"), "equal text"),
        ("Evelyn", answered("evelyn"), "equal words"),
        ("18", answered("2 * 9"), "equal by algebra"),
        ("18", answered("2 * 8"), "different values"),
        ("18", answered("17 or 18"), "not one value"),
        ("18", answered("x > 18"), "not one value"),
        ("5 cm", answered("5 m"), "different units"),
        ("18", answered("18_7"), "the numeral with its base"),
        ("[0, 1)", answered("(0, 1)"), "different brackets"),
        (r"\{1, 2\}", answered(r"\{2, 1\}"), "equal elements"),
        (r"\{1, 2\}", answered(r"\{1, 3\}"), "different elements"),
        ("x = 5", answered("y = 5"), "different names"),
        ("A", answered("a"), "letters of different case"),
        ("18", r"\boxed{1}\boxed{2}", "several boxes that differ"),
        ("18", "<think>18", "no answer: <think> is not closed"),
        ("18", "<answer>18", "no answer: <answer> is not closed, or not opened"),
        ("18", "18", r"no answer: no <answer> and no \boxed{}"),
        ("18", answered(" "), "no answer: empty"),
        ("18", answered("9" * 3_000), f"refused: over {MAX_ANSWER_CHARS} characters"),
        ("18", answered("9^{9^{9^9}}"), "refused: a tower of powers"),
        ("18", answered("(" * 40 + "1" + ")" * 40), "refused: nested too deeply"),
    ],
)
def test_the_verdict_names_the_rule_that_decided(gold, completion, reason):
    assert verify_math(gold, completion).reason == reason


def test_several_boxes_are_one_answer_to_a_gold_of_several_and_must_agree_for_any_other():
    assert verify_math("1, 2", r"\boxed{1} and \boxed{2}").score == 1.0
    assert verify_math("1, 2", r"\boxed{1} and \boxed{3}").score == 0.0
    assert verify_math("18", r"\boxed{18} and again \boxed{18.0}").score == 1.0
    assert verify_math("18", r"\boxed{17} \boxed{18}").score == 0.0
    assert verify_math("18", r"\boxed{18} \boxed{17}").score == 0.0
    assert verify_math(r"so $\boxed{1}$ or $\boxed{2}$", r"\boxed{2, 1}").score == 1.0


def test_a_tolerance_is_a_share_of_the_gold_and_none_by_default():
    assert verify_math("3.14159", r"\boxed{3.14}").score == 0.0
    assert verify_math("3.14159", r"\boxed{3.14}", relative_tolerance=1e-3).score == 1.0
    assert math_reward([r"\boxed{3.14}"], answer=["3.14159"], relative_tolerance=1e-3) == [1.0]


def test_verdicts_are_counted_by_kind():
    take_verdicts()
    verify_math("18", r"\boxed{18.0}")
    math_reward([r"\boxed{18.0}", "none"], answer=["18"] * 2)
    verify_math("18", r"\boxed{9^{9^9}}")
    assert take_verdicts() == {"equal numbers": 2, "no answer": 1, "refused": 1}


def test_golds_are_checked_against_themselves_and_named_by_position():
    golds = ["18", "", r"\frac{1}{2}", None, "18", 7, "", "... #### 1,000", r"x + \boxed{y^2}"]
    assert [position for position, _ in check_golds(golds)] == [1, 3, 6]
    assert all("gold cannot be read" in reason for _, reason in check_golds(golds))


def test_plain_golds_are_checked_without_judging_them_and_each_only_once(monkeypatch):
    """A hundred thousand of them must not delay a run."""
    judged, read = [], []
    plain_read = math.read_number
    monkeypatch.setattr(math, "verify_math", lambda *pair: judged.append(pair))
    monkeypatch.setattr(math, "read_number", lambda text: read.append(text) or plain_read(text))
    assert check_golds([f"{number}" for number in range(1000)] * 3) == []
    assert judged == []
    assert len(read) == 1000


def test_a_timeout_is_worth_nothing_and_our_own_failure_is_not_scored(monkeypatch):
    """Each with a pair of its own, because decisions are remembered."""
    problems = [
        ("timeout", 0.0, "timeout"),
        ("crashed", 0.0, "refused"),
        ("raised", 0.0, "refused"),
        ("not started", None, "our failure"),
    ]
    for row, (problem, score, kind) in enumerate(problems):
        reply = Reply(None, problem)
        monkeypatch.setattr(algebra.pool, "call", lambda *_, reply=reply, **__: reply)
        verdict = verify_math("x + 1", rf"\boxed{{x + {row + 2}}}")
        assert verdict.score == score
        assert verdict.reason.partition(":")[0] == kind


def test_a_failure_to_start_is_not_remembered(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(algebra.pool, "call", lambda *_, **__: Reply(None, "not started"))
        assert verify_math("x + 21", r"\boxed{21 + x}").score is None
    assert verify_math("x + 21", r"\boxed{21 + x}").score == 1.0


def test_a_question_is_put_once_more_when_a_worker_dies_over_it(monkeypatch):
    replies = [Reply(None, "crashed"), Reply(["equal"])]
    monkeypatch.setattr(algebra.pool, "call", lambda *_, **__: replies.pop(0))
    assert verify_math("x + 41", r"\boxed{41 + x}").score == 1.0
    assert replies == []


def test_what_was_decided_is_not_asked_again(monkeypatch):
    assert verify_math("x + 31", r"\boxed{31 + x}").score == 1.0
    monkeypatch.setattr(algebra.pool, "call", lambda *_, **__: Reply(None, "not started"))
    assert verify_math("x + 31", r"\boxed{31 + x}").score == 1.0


def test_the_reward_reads_texts_and_chat_messages_alike():
    """TRL calls by keyword, with more keywords than a reward asks for."""
    texts = [answered("18"), answered("19"), answered("2 * 9"), answered("18")]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    others = {
        "prompts": ["p"] * 4,
        "completion_ids": [[1]] * 4,
        "trainer_state": object(),
        "log_extra": print,
        "log_metric": print,
    }
    golds = ["18", "18", "18", ""]
    assert math_reward(completions=texts, answer=golds, **others) == [1.0, 0.0, 1.0, None]
    assert math_reward(completions=chats, answer=golds, **others) == [1.0, 0.0, 1.0, None]


def test_the_last_message_of_a_conversation_is_judged():
    parts = [{"type": "text", "text": r"\boxed{1"}, {"type": "text", "text": "8}"}]
    chat = [
        {"role": "assistant", "content": r"\boxed{17}"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": parts},
    ]
    silent = [{"role": "assistant", "content": None}]
    assert math_reward([chat, silent, []], answer=["18"] * 3) == [1.0, 0.0, 0.0]


def test_a_bound_and_pickled_reward_works():
    lenient = pickle.loads(pickle.dumps(partial(math_reward, allow_last_number=True)))
    assert lenient(["18 it is"], answer=["18"]) == [1.0]
    assert lenient([r"\boxed{1 + x}"], answer=["x + 1"]) == [1.0]


def test_threads_and_event_loops_may_verify():
    completions = [rf"\boxed{{{i} + x}}" for i in range(100, 140)]
    golds = [f"x + {i}" for i in range(100, 140)]
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(math_reward(completions, answer=golds)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0] * 40] * 8
    verdict = asyncio.run(asyncio.to_thread(verify_math, "x + 140", r"\boxed{140 + x}"))
    assert verdict.score == 1.0


def verify_in_another_process(queue):
    queue.put(verify_math("x + 150", r"\boxed{150 + x}"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_may_verify(method):
    assert verify_math("x + 149", r"\boxed{149 + x}").score == 1.0
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=verify_in_another_process, args=(queue,))
    process.start()
    assert queue.get(timeout=30).score == 1.0
    process.join(10)
    assert process.exitcode == 0
