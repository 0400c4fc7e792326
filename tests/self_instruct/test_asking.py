"""Order, log, budget and failures, with teachers that are functions."""

import threading
import time

import pytest

from posttrain.errors import ConfigError
from posttrain.self_instruct.asking import Budget
from posttrain.self_instruct.log import read_answers
from posttrain.self_instruct.teacher import Answer, NoAnswer, Request, TeacherError
from tests.self_instruct.conftest import (
    FunctionTeacher,
    ask,
    make_asker,
    make_request,
    requests_from,
)


def test_answers_come_in_the_order_of_the_requests_whatever_order_they_arrive_in(tmp_path):
    """The first waits until the third has been answered."""
    third_is_done = threading.Event()

    def answer(request: Request) -> str:
        if request.name.endswith("0"):
            assert third_is_done.wait(timeout=10)
        if request.name.endswith("2"):
            third_is_done.set()
        return request.prompt

    asker = make_asker(tmp_path, FunctionTeacher(answer, calls_at_once=3))
    found = ask(asker, [make_request(i) for i in range(6)])
    assert found == [(f"tasks-{i:05d}", f"prompt {i}") for i in range(6)]


@pytest.mark.parametrize(("calls", "per_call"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_what_a_request_may_build_on_does_not_depend_on_timing(tmp_path, calls, per_call):
    """Request i is pulled when the calls before it, but for those at once, have been taken."""

    def answer(request: Request) -> str:
        time.sleep(hash(request.prompt) % 5 / 1000)
        return "x"

    taken, seen = [], []

    def next_request() -> Request | None:
        seen.append(len(taken))
        return make_request(len(seen) - 1) if len(seen) <= 24 else None

    teacher = FunctionTeacher(answer, calls_at_once=calls, requests_per_call=per_call)
    for pair in make_asker(tmp_path, teacher).ask(next_request):
        taken.append(pair)
    at_once = calls * per_call
    # After the first fill, a call is made when the oldest one's last answer has been taken.
    expected = [max(0, (i // per_call - calls + 1) * per_call) for i in range(24)]
    assert seen[:24] == expected
    assert len(taken) == 24
    assert max(i - s for i, s in enumerate(seen[:24])) == at_once - 1


def test_several_requests_share_a_call(tmp_path):
    teacher = FunctionTeacher(lambda r: r.name, requests_per_call=4)
    assert len(ask(make_asker(tmp_path, teacher), [make_request(i) for i in range(10)])) == 10
    assert teacher.num_calls == 3


def test_everything_is_in_the_log_before_it_is_taken(tmp_path):
    asker = make_asker(tmp_path, FunctionTeacher(lambda r: f"answer to {r.prompt}"))
    for request, answer in asker.ask(requests_from([make_request(i) for i in range(3)])):
        assert read_answers(asker.log.path)[-1] == (request, answer)


def test_what_the_log_holds_is_not_asked_again_and_still_counts(tmp_path):
    requests = [make_request(i) for i in range(4)]
    answered = Answer("x", prompt_tokens=10, completion_tokens=1)
    first = make_asker(tmp_path, FunctionTeacher(lambda _: answered, requests_per_call=2))
    ask(first, requests[:3])
    teacher = FunctionTeacher(lambda _: answered, requests_per_call=2)
    again = make_asker(tmp_path, teacher)
    assert len(ask(again, requests)) == 4
    assert teacher.asked == ["tasks-00003"]
    assert again.num_from_log == 3
    assert again.budget.spent.prompt_tokens == 40


def failing(*numbers: int):
    def answer(request: Request) -> str:
        if int(request.name[-5:]) in numbers:
            raise NoAnswer("HTTP 500: down", attempts=6)
        return "x"

    return FunctionTeacher(answer)


def test_a_request_without_an_answer_is_passed_over_counted_and_logged(tmp_path):
    asker = make_asker(tmp_path, failing(1))
    assert ask(asker, [make_request(i) for i in range(4)])[1] == ("tasks-00001", "")
    assert asker.budget.spent.num_failed == 1
    assert asker.budget.spent.num_sent == 3 + 6
    assert read_answers(asker.log.path)[1][1].problem == "HTTP 500: down"
    assert asker.error is None


def test_the_third_failure_in_a_row_ends_the_run_and_the_next_run_asks_that_one_again(tmp_path):
    requests = [make_request(i) for i in range(6)]
    asker = make_asker(tmp_path, failing(2, 3, 4))
    assert len(ask(asker, requests)) == 4
    assert "3 requests in a row stayed without an answer" in str(asker.error)
    assert asker.teacher.closed
    teacher = failing()
    assert len(ask(make_asker(tmp_path, teacher), requests)) == 6
    assert teacher.asked == ["tasks-00004", "tasks-00005"]


def test_failures_with_an_answer_between_them_do_not_end_the_run(tmp_path):
    asker = make_asker(tmp_path, failing(0, 1, 3, 4, 6))
    assert len(ask(asker, [make_request(i) for i in range(8)])) == 8
    assert asker.error is None


def test_a_teacher_that_cannot_go_on_ends_the_run_with_what_was_answered(tmp_path):
    def answer(request: Request) -> str:
        if request.name == "tasks-00002":
            raise TeacherError("the key has expired")
        return "x"

    asker = make_asker(tmp_path, FunctionTeacher(answer))
    assert len(ask(asker, [make_request(i) for i in range(5)])) == 2
    assert asker.stopped == str(asker.error) == "the key has expired"


def priced(**limits) -> dict:
    """`prompt 0` is estimated at 2 tokens and its answer at most 50; it takes 3 and 10."""
    return {"prompt_price": 2e6, "completion_price": 1e6, **limits}


TAKES = Answer("x", prompt_tokens=3, completion_tokens=10)


@pytest.mark.parametrize(
    ("limits", "num_answers"),
    [
        ({"max_requests": 3}, 3),
        ({"max_tokens": 51}, 0),
        ({"max_tokens": 52}, 1),  # 13 are spent; 13 + 52 = 65 would be needed
        ({"max_tokens": 65}, 2),
        (priced(max_cost=53.0), 0),  # 2 · 2 + 50 = 54 at most; 2 · 3 + 10 = 16 each in the end
        (priced(max_cost=54.0), 1),
        (priced(max_cost=70.0), 2),
    ],
)
def test_no_request_is_sent_whose_longest_answer_would_break_the_budget(
    tmp_path, limits, num_answers
):
    teacher = FunctionTeacher(lambda _: TAKES)
    asker = make_asker(tmp_path, teacher, **limits)
    assert len(ask(asker, [make_request(i) for i in range(9)])) == num_answers
    assert len(teacher.asked) == num_answers
    assert next(iter(limits)) in asker.stopped or "max_cost" in asker.stopped


def test_the_budget_counts_requests_under_way_at_their_most(tmp_path):
    """Two at once could take 104; alone, 52 after 13 fit into 80 twice."""
    running, most = [], []

    def answer(request: Request) -> Answer:
        running.append(request.name)
        time.sleep(0.02)
        most.append(len(running))
        running.remove(request.name)
        return TAKES

    teacher = FunctionTeacher(answer, calls_at_once=4)
    asker = make_asker(tmp_path, teacher, max_tokens=80)
    assert len(ask(asker, [make_request(i) for i in range(9)])) == 3
    assert max(most) == 1


def test_retries_count_as_requests(tmp_path):
    asker = make_asker(tmp_path, FunctionTeacher(lambda _: Answer("x", attempts=3)), max_requests=7)
    assert len(ask(asker, [make_request(i) for i in range(9)])) == 3
    assert asker.budget.spent.num_sent == 9


def test_the_cost_is_per_million_tokens():
    budget = Budget(prompt_price=0.5, completion_price=2.0)
    budget.settle(make_request(), Answer("x", prompt_tokens=1_000_000, completion_tokens=250_000))
    assert budget.cost == pytest.approx(0.5 + 0.5)


def test_a_limit_on_money_needs_prices():
    with pytest.raises(ConfigError, match="max_cost: expected prices"):
        Budget(max_cost=5.0)


def test_an_ended_budget_goes_on_where_it_ended_when_it_is_raised(tmp_path):
    requests = [make_request(i) for i in range(5)]
    ask(make_asker(tmp_path, FunctionTeacher(lambda _: TAKES), max_requests=2), requests)
    teacher = FunctionTeacher(lambda _: TAKES)
    asker = make_asker(tmp_path, teacher, max_requests=4)
    assert len(ask(asker, requests)) == 4
    assert teacher.asked == ["tasks-00002", "tasks-00003"]
