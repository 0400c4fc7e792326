"""A tiny random model as teacher, through the decode loop that training uses."""

import pytest
from huggingface_hub import constants

from posttrain.self_instruct.local import LocalTeacher
from posttrain.self_instruct.teacher import Request, TeacherError
from recipes.self_instruct import Config, choose_teacher
from tests.conftest import make_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(folder):
    return LocalTeacher(folder, batch_size=4)


def ask(number: int, **settings) -> Request:
    settings = {"max_tokens": 8, **settings}
    return Request(f"tasks-{number:05d}", f"{number + 2} 5 9 27", **settings)


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(teacher):
    requests = [ask(0), ask(1, temperature=0.5), ask(2, max_tokens=3), ask(3)]
    together = teacher.answer(requests)
    assert together == [teacher.answer([request])[0] for request in requests]
    assert len({answer.text for answer in together}) == 4


def test_the_seed_changes_the_draw_and_not_the_greedy_answer(teacher):
    texts = {teacher.answer([ask(0, seed=seed)])[0].text for seed in range(4)}
    greedy = {teacher.answer([ask(0, seed=seed, temperature=0.0)])[0].text for seed in range(4)}
    assert len(texts) > 1
    assert len(greedy) == 1


def test_tokens_are_counted_and_the_end_is_named(teacher):
    (answer,) = teacher.answer([ask(0, max_tokens=2)])
    assert (answer.prompt_tokens, answer.completion_tokens) == (4, 2)
    assert (answer.finish_reason, answer.estimated) == ("length", False)


def test_an_answer_ends_before_a_stop_text(teacher):
    (whole,) = teacher.answer([ask(0, temperature=0.0)])
    stop = whole.text[5:9]
    (stopped,) = teacher.answer([ask(0, temperature=0.0, stop=("not there", stop))])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.completion_tokens < whole.completion_tokens  # nothing is drawn behind it


def test_a_tiny_top_p_leaves_the_most_likely_tokens_alone(teacher):
    requests = [ask(0, temperature=0.0), ask(0, top_p=1e-6), ask(0)]
    greedy, narrow, wide = (teacher.answer([request])[0].text for request in requests)
    assert narrow == greedy != wide


def test_a_model_without_a_url_runs_here_and_one_with_a_url_is_its_name_there(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    here = choose_teacher(Config(teacher_model=folder, concurrency=3))
    assert isinstance(here, LocalTeacher)
    assert (here.requests_per_call, here.calls_at_once) == (3, 1)
    there = choose_teacher(
        Config(teacher_url="http://host/v1", teacher_model="name", concurrency=3)
    )
    assert (there.model, there.requests_per_call, there.calls_at_once) == ("name", 1, 3)


def test_the_chat_template_is_used_where_there_is_one(tmp_path):
    make_model().save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "7 {% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}8{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    (answer,) = LocalTeacher(str(tmp_path)).answer([ask(0)])
    assert answer.prompt_tokens == 1 + 4 + 1


def test_answers_end_where_the_models_positions_do(teacher):
    """The tiny model has 256 positions; the prompt takes 4."""
    (answer,) = teacher.answer([ask(0, max_tokens=3072, temperature=0.7)])
    assert answer.completion_tokens <= 252
    long = Request("tasks-00000", "5 " * 300, max_tokens=8)
    with pytest.raises(TeacherError, match="a prompt has 300 tokens, the model 256 positions"):
        teacher.answer([long])
