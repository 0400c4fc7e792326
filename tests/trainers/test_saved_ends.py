"""Where completions end is one set: in sampling, and in what is saved for other programs."""

import json

import pytest
from transformers import GenerationConfig

from posttrain.data.encode import stop_ids_of
from posttrain.trainers.fit import fit, training_arguments
from tests.conftest import EOS, make_model, make_tokenizer
from tests.trainers.tiny import Config, sft_trainer

TURN_END = 96
TEMPLATE = "{% for m in messages %}{{ m['content'] }} 96 {% endfor %}"


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [str(TURN_END)]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(("listed", "found"), [(None, (1,)), (5, (1, 5)), ([1, 7, 5], (1, 5, 7))])
def test_completions_end_where_the_models_generation_config_says_too(listed, found, tmp_path):
    GenerationConfig(eos_token_id=listed).save_pretrained(tmp_path)
    assert stop_ids_of(str(tmp_path), make_tokenizer()) == found


def test_without_one_the_tokenizer_and_its_template_decide(tmp_path):
    assert stop_ids_of(str(tmp_path), chat_tokenizer()) == (EOS, TURN_END)


@pytest.mark.parametrize("listed", [None, [EOS, 7]])
def test_the_saved_model_stops_at_the_end_of_a_turn_in_transformers(listed, tmp_path):
    model = make_model()
    model.generation_config.eos_token_id = listed
    config = Config(output_dir=str(tmp_path / "run"), max_steps=1)
    fit(sft_trainer(model, training_arguments(config), tokenizer=chat_tokenizer()), config)
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == sorted({EOS, TURN_END, *(listed or ())})
