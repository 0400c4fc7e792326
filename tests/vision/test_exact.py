"""Losses, gradients and samples with images are those of the plain model."""

from functools import partial

import pytest
import torch

from posttrain.data import load_documents, load_pairs, load_prompts
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.vision import load_processor
from posttrain.packed.batch import pack_documents, pack_groups, pack_pairs
from posttrain.packed.forward import packed_logps
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.sampling import Sampling, choose
from posttrain.run.settings import ModelConfig
from tests.vision import tiny

pytest.importorskip("PIL")


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
    """Both have gradients in the same weights, which differ by 1e-5 of their norm."""
    found, expected = (
        {n: w.grad for n, w in m.named_parameters() if w.grad is not None and w.grad.norm() > 0}
        for m in (model, plain)
    )
    assert found.keys() == expected.keys()
    assert any("visual.blocks.0" in name for name in found)
    ours, theirs = (torch.cat([g.flatten() for g in each.values()]) for each in (found, expected))
    assert relative(ours, theirs) < 1e-5


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


def test_another_image_and_images_in_another_order_give_other_log_probs(folder, data, tmp_path):
    model, document = trained_model(folder), dict(data["documents"][0])
    other = tiny.save_image(tmp_path / "other.png", tiny.SIZES[0], seed=9)
    shown = [document["images"], [{"path": str(other), "bytes": None}]]
    batches = [pack_documents([document | {"images": seen}], device="cpu") for seen in shown]
    first, second = (packed_logps(model, batch).logps for batch in batches)
    assert (first - second).abs().max() > 1e-3
    two = [document | {"images": seen} for seen in shown]
    both, swapped = (
        packed_logps(model, pack_documents(rows, device="cpu")).logps for rows in (two, two[::-1])
    )
    torch.testing.assert_close(both, torch.cat([first, second]), rtol=0, atol=1e-5)
    torch.testing.assert_close(swapped, torch.cat([second, first]), rtol=0, atol=1e-5)


def test_dpo_has_the_loss_and_gradients_of_the_plain_padded_model(folder, data):
    model, plain = trained_model(folder), plain_model(folder)
    pairs = list(data["pairs"])
    batch = pack_pairs(pairs, device="cpu")
    found = batch.dense(packed_logps(model, batch).logps).sum(1)
    sides = [
        (p, p["prompt_ids"], p[name]) for p in pairs for name in ("chosen_ids", "rejected_ids")
    ]
    rows = plain_logps(folder, plain, [([*a, *b], p["images"]) for p, a, b in sides])
    expected = torch.stack([r[-len(b) :].sum() for r, (_, _, b) in zip(rows, sides, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for logps in (found, expected):
        margin = 0.1 * (logps[0::2] - logps[1::2])
        (-torch.nn.functional.logsigmoid(margin).sum()).backward()
    assert_same_gradients(model, plain)


@pytest.fixture(scope="module")
def sampled(folder, data):
    """A model, its prompts, and completions of them: two each, sampled; and one each, greedy."""
    model, prompts = trained_model(folder), list(data["prompts"])
    generator = HFGenerator(model)
    ids, images = [p["prompt_ids"] for p in prompts], [p["images"] for p in prompts]
    drawn = generator.generate(ids, Sampling(6, (tiny.EOS,)), 2, images=images)
    greedy = generator.generate(ids, Sampling(6, (tiny.EOS,), temperature=0.0), 1, images=images)
    return model, prompts, drawn, greedy


def test_log_probs_in_sampling_are_those_of_the_training_and_of_the_plain_forward(folder, sampled):
    model, prompts, drawn, _ = sampled
    assert way_to_generate(model) == "cache"
    ids = [[c.token_ids for c in siblings] for siblings in drawn]
    images = [p["images"] for p in prompts]
    batch = pack_groups([p["prompt_ids"] for p in prompts], ids, device="cpu", images=images)
    with torch.no_grad():
        trained = packed_logps(model, batch).logps
        rows = [
            (p, c.token_ids) for p, siblings in zip(prompts, drawn, strict=True) for c in siblings
        ]
        plain = plain_logps(
            folder, plain_model(folder), [([*p["prompt_ids"], *c], p["images"]) for p, c in rows]
        )
    plain = torch.cat([row[-len(c) :] for row, (_, c) in zip(plain, rows, strict=True)])
    logps = torch.tensor([x for siblings in drawn for c in siblings for x in c.logps])
    torch.testing.assert_close(logps, trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(logps, plain, rtol=0, atol=1e-5)


def test_greedy_completions_are_those_of_transformers_generate(folder, sampled):
    from PIL import Image

    _, prompts, _, greedy = sampled
    plain, processor = plain_model(folder), load_processor(str(folder / "model"))
    for prompt, (completion,) in zip(prompts, greedy, strict=True):
        ids, seen = torch.tensor([prompt["prompt_ids"]]), {}
        if prompt["images"]:
            images = [Image.open(each["path"]) for each in prompt["images"]]
            text = processor.image_token * len(images)
            found = processor(text=[text], images=images, return_tensors="pt")
            seen = {name: found[name] for name in ("pixel_values", "image_grid_thw")}
            seen["mm_token_type_ids"] = (ids == tiny.IMAGE_ID).int()
        expected = plain.generate(
            ids,
            **seen,
            max_new_tokens=6,
            do_sample=False,
            suppress_tokens=[tiny.IMAGE_ID, tiny.VIDEO_ID],
        )
        assert completion.token_ids == expected[0, ids.shape[1] :].tolist()


def test_tokens_that_stand_for_images_are_never_sampled():
    logits = torch.zeros(1, 8)
    logits[0, 5] = 9.0
    stops = torch.tensor([1])
    for never, expected in (((), 5), ((5, 6), 0)):
        sampling = Sampling(4, (1,), temperature=0.0, never=never)
        token, logps = choose(logits, torch.zeros(1), sampling, stops, 0)
        assert token.item() == expected
    assert logps[1].item() == pytest.approx(-torch.tensor(6.0).log().item())


def test_an_image_that_rows_share_is_processed_once(folder, data, monkeypatch):
    model, document = trained_model(folder), dict(data["documents"][0])
    vision, calls = model.vision_inputs, []
    assert vision.is_additive
    plain = vision._processed
    monkeypatch.setattr(vision, "_processed", lambda images: calls.append(1) or plain(images))
    batch = pack_documents([document] * 3, device="cpu")
    once = packed_logps(model, batch).logps
    assert len(calls) == 1
    monkeypatch.setitem(vars(vision), "is_additive", False)
    torch.testing.assert_close(packed_logps(model, batch).logps, once, rtol=0, atol=0)
    assert len(calls) == 2


def test_on_several_ranks_a_batch_without_images_has_gradients_for_what_sees(
    folder, data, monkeypatch
):
    """DDP waits for all of them, and another rank's batch may have images."""
    document, found = dict(data["documents"][3]), []
    assert not document["images"]
    for world in (1, 2):
        monkeypatch.setattr("posttrain.packed.rows.rank_and_world", lambda world=world: (0, world))
        model = trained_model(folder)
        loss = packed_logps(model, pack_documents([document], device="cpu")).logps.mean()
        loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    alone, together = found
    assert any(grad is None for grad in alone.values())
    for name, grad in together.items():
        expected = torch.zeros_like(grad) if alone[name] is None else alone[name]
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-7)
