"""Judges as rewards: what they ask, what they make of verdicts, and what a failure costs."""

import itertools
import json

import pytest
import torch
from huggingface_hub import constants
from tenacity import wait_none

from posttrain.errors import ConfigError
from posttrain.judges.judge import PairwiseJudge, ScalarJudge, pairs_of
from posttrain.judges.verdicts import FAILED, Verdicts
from posttrain.rewards.call import Scoring, check_rewards, score
from posttrain.rewards.checks import reward_facts
from posttrain.rewards.pieces import take_verdicts
from posttrain.self_instruct import server as server_module
from posttrain.self_instruct.asking import Budget
from posttrain.self_instruct.server import ServerTeacher
from posttrain.self_instruct.teacher import Answer, NoAnswer, Request, TeacherError
from tests.judges.test_prompts import sections
from tests.self_instruct.chat_server import serve, status, text
from tests.self_instruct.conftest import FunctionTeacher


def teacher_of(verdict):
    """A teacher whose answer to a request is `verdict` of the texts in its prompt."""

    def answer(request):
        found = verdict(sections(request.prompt))
        return found if isinstance(found, Answer) else json.dumps(found)

    return FunctionTeacher(answer)


def by_length(texts):
    return {"score": len(texts["ANSWER"])}


def longer(texts):
    a, b = (len(texts[f"ANSWER {name}"]) for name in "AB")
    return {"better": "tie" if a == b else "A" if a > b else "B"}


def call(judge, completions, prompts=None, **columns):
    take_verdicts()
    return judge(completions=completions, prompts=prompts or ["q"] * len(completions), **columns)


def test_a_score_from_1_to_10_becomes_a_reward_from_0_to_1():
    teacher = teacher_of(by_length)
    judge = ScalarJudge(Verdicts(teacher, Budget()))
    assert call(judge, ["x", "x" * 10, "x" * 4]) == [0.0, 1.0, pytest.approx(1 / 3)]
    chat = [[{"role": "assistant", "content": "x" * 10}]]
    assert call(judge, chat) == [1.0]
    assert len(teacher.asked) == 3  # the fourth was known


def test_the_judge_reads_the_question_as_asked_and_the_answer_of_the_data():
    seen = []
    teacher = teacher_of(lambda texts: seen.append(texts) or {"score": 5})
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"},
             {"role": "user", "content": "why"}]  # fmt: skip
    call(
        ScalarJudge(Verdicts(teacher, Budget())), ["a", "b"], ["rendered", "rendered"],
        source_prompt=[json.dumps("plain"), json.dumps(turns)], answer=["5", None],
    )  # fmt: skip
    assert [texts["QUESTION"] for texts in seen] == [
        "plain",
        "USER: hi\n\nASSISTANT: yes?\n\nUSER: why",
    ]
    assert [texts.get("REFERENCE ANSWER") for texts in seen] == ["5", None]


def test_each_two_completions_of_a_prompt_are_compared_in_both_orders():
    teacher = teacher_of(longer)
    judge = PairwiseJudge(Verdicts(teacher, Budget()))
    found = call(judge, ["xx", "x", "xxx", "a", "b"], ["p", "p", "p", "q", "q"])
    assert found == [0.5, 0.0, 1.0, 0.5, 0.5]
    assert len(teacher.asked) == 2 * (3 + 1)


def test_a_judge_that_prefers_a_position_has_no_preference():
    judge = PairwiseJudge(Verdicts(teacher_of(lambda _: {"better": "A"}), Budget()))
    assert call(judge, ["x", "yy", "zzz"]) == [0.5, 0.5, 0.5]


def test_equal_completions_are_a_tie_that_is_not_asked_about():
    teacher = teacher_of(longer)
    judge = PairwiseJudge(Verdicts(teacher, Budget()))
    assert call(judge, ["x", "x"]) == [0.5, 0.5]
    assert teacher.asked == []
    assert call(judge, ["x"], ["alone"]) == [None]


def test_rivals_are_the_next_in_a_ring():
    assert pairs_of([0, 1, 2, 3], 1) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert sorted(map(sorted, pairs_of([4, 5, 6, 7]))) == [
        list(pair) for pair in itertools.combinations([4, 5, 6, 7], 2)
    ]
    assert pairs_of([8, 9], 5) == [(8, 9)]
    assert pairs_of([8]) == []


def test_a_verdict_that_cannot_be_read_is_none_and_counted(capsys):
    def verdict(texts):
        if texts["ANSWER"] == "cut":
            return Answer('{"score": 5}', "length", completion_tokens=9)
        return {"score": 11} if texts["ANSWER"] == "bad" else {"score": 10}

    judge = ScalarJudge(Verdicts(teacher_of(verdict), Budget()))
    assert call(judge, ["good", "bad", "cut"]) == [1.0, None, None]
    assert take_verdicts() == {FAILED: 2}
    said = capsys.readouterr().out
    assert said.count("judge   no verdict") == 1


def test_a_comparison_that_failed_in_one_order_does_not_count():
    def verdict(texts):
        return {"better": "C"} if texts["ANSWER A"] == "x" else longer(texts)

    judge = PairwiseJudge(Verdicts(teacher_of(verdict), Budget()))
    assert call(judge, ["x", "yy", "zzz"]) == [None, 0.0, 1.0]
    assert take_verdicts() == {FAILED: 2}


def test_no_answer_costs_its_own_completion_and_is_asked_again_later():
    answers = {"good": True, "lost": False}

    def verdict(texts):
        if not answers[texts["ANSWER"]]:
            raise NoAnswer("gone", attempts=3)
        return {"score": 10}

    verdicts = Verdicts(teacher_of(verdict), Budget())
    judge = ScalarJudge(verdicts)
    assert call(judge, ["good", "lost"]) == [1.0, None]
    assert (verdicts.budget.spent.num_sent, verdicts.budget.spent.num_failed) == (4, 1)
    answers["lost"] = True
    assert call(judge, ["good", "lost"]) == [1.0, 1.0]
    assert verdicts.teacher.num_calls == 3


def test_answers_are_in_a_file_that_the_next_run_reads(tmp_path):
    path = tmp_path / "judgements.jsonl"
    first = ScalarJudge(Verdicts(teacher_of(by_length), Budget(), path=path))
    expected = call(first, ["xx", "xxx"])
    silent = FunctionTeacher(lambda _: pytest.fail("asked again"))
    budget = Budget(max_requests=2)
    again = ScalarJudge(Verdicts(silent, budget, path=path))
    assert call(again, ["xxx", "xx"]) == expected[::-1]
    assert budget.spent.num_requests == 2
    with pytest.raises(ConfigError, match="budget is spent: max_requests is 2"):
        call(again, ["new"])


def test_a_budget_that_ends_in_a_call_leaves_the_rest_without_a_verdict():
    teacher = teacher_of(by_length)
    judge = ScalarJudge(Verdicts(teacher, Budget(max_requests=2)))
    assert call(judge, ["xx", "xxx", "xxxx"]) == [pytest.approx(1 / 9), pytest.approx(2 / 9), None]
    assert len(teacher.asked) == 2
    with pytest.raises(ConfigError, match="budget is spent"):
        call(judge, ["xxxxx"])
    assert call(judge, ["xx"]) == [pytest.approx(1 / 9)]  # known


def test_it_is_a_reward_with_a_deadline_of_its_own_and_facts_for_the_run():
    judge = ScalarJudge(Verdicts(teacher_of(by_length), Budget()), rubric="Be brief.")
    rewards = {"judge": (judge, 1.0)}
    check_rewards(rewards, ["prompt"])
    found = score(
        rewards, ["x", "x" * 10], prompts=["q", "q"], completion_ids=[[1], [2]], columns={},
        scoring=Scoring(timeout_seconds=1e-9),
    )  # fmt: skip
    assert found.totals == [0.0, 1.0]
    facts = reward_facts(rewards)
    assert facts["reward_facts"]["judge"]["rubric"] == "Be brief."
    assert "rewards" not in facts  # there a run's env.json has the weights, which its report reads


# A server.


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(server_module, "BACKOFF", wait_none())

    def judge(server, kind=ScalarJudge, **settings):
        teacher = ServerTeacher(server.url, max_attempts=2, setting="my.yaml: url", **settings)
        return kind(Verdicts(teacher, Budget()))

    return judge


def test_a_server_is_asked_again_where_that_may_help(served):
    with serve(status(500), text('{"score": 10}')) as server:
        judge = served(server, model="m", key="sk-1")
        assert call(judge, ["a"]) == [1.0]
    assert [asked["body"]["temperature"] for asked in server.asked] == [0.0, 0.0]
    assert judge.verdicts.budget.spent.num_sent == 2


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (status(500), "my.yaml: the judge gives no answer .HTTP 500"),
        (status(401), "my.yaml: url http.*the server refuses"),
        (text("I like it."), "my.yaml: its first verdict cannot be read: expected one JSON"),
        (text('{"score": 9}', "length"), "the answer was cut at .* or more max_tokens"),
    ],
)
def test_a_judge_without_a_verdict_is_said_before_anything_is_trained(served, reply, said):
    with serve(default=reply) as server:
        for kind in (ScalarJudge, PairwiseJudge):
            with pytest.raises(TeacherError, match=said):
                served(server, kind).probe("my.yaml")


def test_the_probe_passes_where_a_verdict_comes(served):
    with serve(text('{"score": 9}'), text('{"better": "A"}')) as server:
        served(server).probe("my.yaml")
        served(server, PairwiseJudge).probe("my.yaml")


def test_a_server_is_told_the_form_of_a_verdict_only_where_that_is_asked_for(served):
    with serve(text('{"score": 9}'), text('{"better": "A"}'), text('{"score": 9}')) as server:
        for kind, structured in ((ScalarJudge, True), (PairwiseJudge, True), (ScalarJudge, False)):
            judge = served(server, kind)
            judge.verdicts.structured = structured
            judge.probe("my.yaml")
    score, pair, plain = (asked["body"].get("structured_outputs") for asked in server.asked)
    assert score["json"]["properties"]["score"] == {"enum": [*range(1, 11)]}
    assert pair["json"]["properties"]["better"] == {"enum": ["A", "B", "tie"]}
    assert plain is None


def test_a_request_without_a_schema_keeps_the_key_that_it_had():
    """Answers that were recorded before requests had schemas are found."""
    assert Request("", "q", 5).key == "af0b84132bf07414"
    assert Request("", "q", 5, schema={"type": "object"}).key != Request("", "q", 5).key


# A model here.


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A LLaMA that says one verdict and ends: its next token is a function of the last one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("judge")
    words = {"<unk>": 0, "<eos>": 1, '{"score":7}': 2}
    inside = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inside, eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=3, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=512, eos_token_id=1, bos_token_id=None,
        pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, :3] = torch.eye(3)
        model.lm_head.weight[2, 0] = 9.0  # unknown words -> the verdict
        model.lm_head.weight[1, 2] = 9.0  # the verdict -> the end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_here_judges_by_the_decode_loop(local):
    from posttrain.self_instruct.local import LocalTeacher

    teacher = LocalTeacher(local, batch_size=2, setting="my.yaml: model")
    judge = ScalarJudge(Verdicts(teacher, Budget(), max_tokens=8))
    judge.probe("my.yaml")
    assert call(judge, ["a b", "c", "d e f"]) == [pytest.approx(6 / 9)] * 3
    pairwise = PairwiseJudge(Verdicts(teacher, Budget(), max_tokens=8))
    with pytest.raises(TeacherError, match="expected the keys reason and better"):
        pairwise.probe("my.yaml")
