"""A reward model from disk, and as a reward: what it says of answers, by their token ids."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from posttrain.errors import ConfigError
from posttrain.models.reward_model import RewardModel, load_reward, load_reward_model
from posttrain.rewards.call import check_rewards, score
from tests.conftest import make_model, make_tokenizer
from tests.trainers.tiny import Config, pairs

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9]]
ANSWERS = [[10, 11, 1], [12, 1], [13, 14, 15, 1]]


def save_causal(folder, **settings):
    make_model(**settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_causal(tmp_path_factory.mktemp("causal"))


def load(folder, **settings):
    return load_reward_model(
        Config(model_name_or_path=str(folder), **settings), make_tokenizer(), quiet=True
    )


def alone(model, prompt, answer):
    """By an ordinary forward of the whole sequence."""
    with torch.no_grad():
        return model(torch.tensor([prompt + answer])).logits[0, 0].item()


@pytest.mark.parametrize("max_tokens", [6, 1000])
def test_its_scores_are_those_of_each_answer_alone_however_they_are_packed(causal, max_tokens):
    model = load(causal)
    reward = RewardModel(model, max_tokens_per_microbatch=max_tokens)
    expected = [alone(model, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert reward(PROMPTS, ANSWERS) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(set(expected)) == 3


def test_centred_scores_of_the_reference_answers_have_mean_0(causal):
    config = Config(model_name_or_path=str(causal))
    plain = load_reward(config, make_tokenizer())
    data = pairs(7)
    centred = load_reward(config, make_tokenizer(), centred_on=data)
    scores = centred(data["prompt_ids"], data["chosen_ids"])
    assert sum(scores) / 7 == pytest.approx(0, abs=1e-6)
    differences = torch.tensor(plain(PROMPTS, ANSWERS)) - torch.tensor(centred(PROMPTS, ANSWERS))
    assert differences.tolist() == pytest.approx([centred.offset] * 3, abs=1e-6)
    assert abs(centred.offset) > 1e-3


def test_it_is_called_as_any_other_reward_and_trains_nothing(causal):
    reward = RewardModel(load(causal))
    rewards = {"score": (reward, 2.0)}
    check_rewards(rewards, ["prompt_ids", "prompt"])
    columns = {"prompt_ids": PROMPTS}
    found = score(
        rewards, ["a", "b", "c"], prompts=["x", "x", "y"], completion_ids=ANSWERS, columns=columns
    )
    assert found.errors == 0
    assert found.totals == pytest.approx([2 * s for s in reward(PROMPTS, ANSWERS)])
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    with pytest.raises(ConfigError, match="'prompt_ids'"):
        check_rewards(rewards, ["prompt"])


def test_a_causal_model_gets_a_new_head_from_the_seed_and_keeps_its_trunk(causal):
    first, second, other = (load(causal, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert 0.5 < first.score.weight.std() * (32 + 1) ** 0.5 < 1.5
    expected = make_model().model.state_dict()
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert first.config.num_labels == 1


def test_a_saved_classifier_comes_back_with_its_head(causal, tmp_path):
    model = load(causal, seed=5)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for again in (load(tmp_path), AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        assert torch.equal(again.score.weight, model.score.weight)
        assert alone(again, PROMPTS[0], ANSWERS[0]) == pytest.approx(
            alone(model, PROMPTS[0], ANSWERS[0]), rel=1e-5
        )


def test_a_model_with_another_tokenizer_is_refused(tmp_path):
    other = make_tokenizer()
    other.add_tokens(["new"])
    save_causal(tmp_path)
    other.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"another tokenizer \(98 tokens\) .* \(97 tokens\)"):
        load(tmp_path)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="there is no folder gone/away/model"):
        load("gone/away/model")


def test_lora_trains_the_adapter_and_the_whole_head(causal):
    model = load(causal, use_peft=True, lora_r=4)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("lora_" in name for name in trained) == 14  # A and B of the seven linear layers
    assert [name for name in trained if "lora_" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]
