"""Losses, gradients and samples with images are those of the plain model."""

import pytest
import torch

pytest.importorskip("PIL")

from functools import partial

from posttrain.data import load_documents, load_pairs, load_prompts
from posttrain.data.read import read_records
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.vision import load_processor
from posttrain.packed.batch import pack_documents, pack_groups, pack_pairs
from posttrain.packed.forward import packed_logps
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.sampling import Sampling
from posttrain.run.settings import ModelConfig
from tests.vision import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, four images, and files of documents, pairs and prompts."""
    folder = tmp_path_factory.mktemp("vision")
    tiny.save_model(folder / "model")
    for place, size in enumerate(tiny.SIZES):
        tiny.save_image(folder / f"{place}.png", size, seed=place)
    one, two = [tiny.ask("5 6 7")], [tiny.ask("8", images=1), tiny.answer("9 10"), tiny.ask("11")]
    three, none = [{"role": "user", "content": "3 <image> 4 <image>"}], [tiny.ask("9 9", images=0)]
    asked = [(one, ["0.png"]), (two, ["1.png", "2.png"]), (three, ["3.png", "0.png"]), (none, [])]
    documents = [
        {"messages": [*turns, tiny.answer("20 21 22 23"[: 3 * place + 5])], "images": images}
        for place, (turns, images) in enumerate(asked)
    ]
    pairs = [
        {"prompt": turns, "chosen": [tiny.answer("30 31")], "rejected": [tiny.answer("32")]}
        | {"images": images}
        for turns, images in asked
    ]
    prompts = [{"prompt": turns, "answer": "30", "images": images} for turns, images in asked]
    tiny.write_rows(folder / "documents.jsonl", documents)
    tiny.write_rows(folder / "pairs.jsonl", pairs)
    tiny.write_rows(folder / "prompts.jsonl", prompts)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    """The three files as data sets, by the name of the file."""
    tokenizer = load_tokenizer(str(folder / "model"))
    common = {"processor": partial(load_processor, str(folder / "model"))}
    return {
        "documents": load_documents(folder / "documents.jsonl", tokenizer, **common),
        "pairs": load_pairs(folder / "pairs.jsonl", tokenizer, **common),
        "prompts": load_prompts(folder / "prompts.jsonl", tokenizer, template="chat", **common),
    }


def trained_model(folder):
    config = ModelConfig(model_name_or_path=str(folder / "model"))
    return load_model(config, quiet=True, images=True)


def plain_model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder / "model").eval()


def plain_logps(folder, model, rows):
    """Log-probs of all tokens but the first of padded (ids, images) rows, by transformers alone."""
    from PIL import Image

    processor = load_processor(str(folder / "model"))
    images = [Image.open(each["path"]) for _, seen in rows for each in seen]
    text = processor.image_token * len(images)
    seen = processor(text=[text], images=images, return_tensors="pt")
    ids = [torch.tensor(ids) for ids, _ in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    logits = model(
        input_ids=padded,
        attention_mask=mask,
        mm_token_type_ids=(padded == tiny.IMAGE_ID).int(),
        pixel_values=seen["pixel_values"],
        image_grid_thw=seen["image_grid_thw"],
    ).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, padded[:, 1:, None])[..., 0]
    return [row[: len(i) - 1] for row, i in zip(logps, ids, strict=True)]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def assert_same_gradients(model, plain):
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    for name, weight in model.named_parameters():
        expected = gradients[name]
        if expected is None or expected.norm() == 0:
            assert weight.grad is None or weight.grad.norm() == 0, name
        else:
            assert relative(weight.grad, expected) < 1e-4, name
    flat = [
        torch.cat([w.grad.flatten() for _, w in m.named_parameters() if w.grad is not None])
        for m in (model, plain)
    ]
    assert relative(*flat) < 1e-5


def test_sft_has_the_loss_and_gradients_of_the_plain_padded_model(folder, data):
    model, plain = trained_model(folder), plain_model(folder)
    documents = list(data["documents"])
    batch = pack_documents(documents, device="cpu")
    loss = -packed_logps(model, batch).logps.mean()
    rows = plain_logps(folder, plain, [(d["input_ids"], d["images"]) for d in documents])
    trained = [torch.tensor(d["trained"])[1:] for d in documents]
    expected = -torch.cat([r[t] for r, t in zip(rows, trained, strict=True)]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, plain)
