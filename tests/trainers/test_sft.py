"""SFTTrainer: the loss by hand, what it refuses, and that it learns."""

import math

import pytest
import torch
from datasets import Dataset

from posttrain.errors import DataError
from posttrain.losses.supervised import nll_loss
from posttrain.packed import head as logprobs
from tests.conftest import EOS, VOCABULARY, count_chunks, make_model
from tests.trainers.tiny import documents, logged, make_trainer


def document(ids, trained):
    return {"input_ids": ids, "trained": trained}


def test_the_logged_loss_is_the_mean_over_all_trained_tokens_of_the_batch(tmp_path):
    """Not the mean of the documents' means: lengths differ."""
    data = documents(8)
    trainer = make_trainer("sft", tmp_path, trainer={"documents": data}, max_steps=1)
    model = make_model()
    losses = []
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1)
        losses += (-picked[torch.tensor(row["trained"][1:])]).tolist()
    trainer.train()
    expected = sum(losses) / len(losses)
    assert logged(trainer, "loss") == pytest.approx([expected], rel=1e-5)


def dft(logps, mask):
    return -logps.exp().detach() * logps * mask


@pytest.mark.parametrize("loss", [nll_loss, dft])
def test_weights_do_not_depend_on_where_the_heads_gradients_are_formed(tmp_path, monkeypatch, loss):
    """In the forward pass for the plain mean; another loss is not taken for one."""

    def weights():
        trainer = make_trainer(
            "sft", tmp_path, trainer={"documents": documents(8), "loss": loss}, max_steps=2
        )
        trainer.train()
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    monkeypatch.setattr(logprobs, "CHUNK_ENTRIES", 5 * VOCABULARY)
    calls = count_chunks(monkeypatch)
    found, num_calls = weights(), len(calls)
    monkeypatch.delattr(nll_loss, "equal_slopes")  # no loss is known to be a plain mean
    torch.testing.assert_close(found, weights(), rtol=1e-5, atol=1e-7)
    more = len(calls) - num_calls > num_calls
    assert more == (loss is nll_loss)


def test_prompt_tokens_are_no_targets(tmp_path):
    """The mean is over the tokens marked `trained` and no others."""
    data = documents(8)
    everything = data.map(lambda row: {"trained": [False] + [True] * (len(row["trained"]) - 1)})
    masked, unmasked = (
        make_trainer("sft", tmp_path, trainer={"documents": rows}, max_steps=1)
        for rows in (data, everything)
    )
    counts = [t.count_items([*t.train_dataset]) for t in (masked, unmasked)]
    assert counts[0] == sum(map(sum, data["trained"])) < counts[1]


def test_another_loss_function_is_used(tmp_path):
    plain = make_trainer("sft", tmp_path, max_steps=1)
    doubled = make_trainer(
        "sft", tmp_path, max_steps=1, trainer={"loss": lambda *args: 2 * nll_loss(*args)}
    )
    plain.train()
    doubled.train()
    assert logged(doubled, "loss")[0] == pytest.approx(2 * logged(plain, "loss")[0])


def test_it_learns_the_documents_by_heart(tmp_path):
    data = documents(8)
    trainer = make_trainer(
        "sft", tmp_path, trainer={"documents": data, "eval_documents": data}, max_steps=40,
        adam_epsilon=1e-8,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] > math.log(97)  # worse than knowing nothing
    assert after["eval_loss"] < 0.2
    assert after["eval_token_accuracy"] > 0.95


def test_rows_are_counted_over_batches_and_selections(tmp_path):
    good, bad = document([5, 6, EOS], [False, True, True]), document([5, 6], [False] * 2)
    rows = Dataset.from_list([bad, *[good] * 1500, bad]).select([*range(1500, 0, -1), 1501])
    with pytest.raises(DataError, match=r"document 1500: expected .* found none of 2"):
        make_trainer("sft", tmp_path, trainer={"documents": rows})


def test_a_row_without_a_trained_token_is_refused_by_its_number(tmp_path):
    rows = [document([5, 6, EOS], [False, True, True]), document([5, 6, 7], [False] * 3)]
    with pytest.raises(DataError, match="document 1: expected at least one trained token"):
        make_trainer("sft", tmp_path, trainer={"documents": Dataset.from_list(rows)})


def test_data_whose_end_of_sequence_token_is_never_a_target_is_refused(tmp_path):
    rows = [document([5, EOS, 6, 7], [False, False, True, True]), document([5, 6], [False, True])]
    with pytest.raises(DataError, match="is a target in none of 2 documents"):
        make_trainer("sft", tmp_path, trainer={"documents": Dataset.from_list(rows)})
