"""The column `images`: where images stand, and what is refused before training."""

import base64
import importlib.util
import json
import shutil
from functools import partial

import datasets
import pytest

from posttrain.data import load_documents, load_pairs, load_prompts, loading
from posttrain.errors import ConfigError, DataError
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.vision import load_processor
from posttrain.packed.batch import pack_documents
from posttrain.packed.forward import packed_logps
from posttrain.run.settings import ModelConfig
from tests.conftest import make_model
from tests.vision import tiny

pytest.importorskip("PIL")

ANSWER = tiny.answer("7 8")
OF_ONE = 15  # tokens of an image of 40 x 24 pixels: 5 x 3 patches of 8 x 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a model without its weights, which data does not need, and one image."""
    folder = tmp_path_factory.mktemp("vision")
    tiny.save_model(folder / "model")
    tiny.save_image(folder / "a.png", (40, 24))
    tiny.save_image(folder / "b.png", (16, 16), seed=1)
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not an image")
    tiny.save_image(folder / "line.png", (1200, 2))
    return folder


def load(folder, *rows, how=load_documents, **settings):
    path = tiny.write_rows(folder / "rows.jsonl", list(rows))
    settings = {"template": "chat", "say": lambda _: None} | settings
    settings = {"processor": partial(load_processor, str(folder / "model"))} | settings
    return how(path, tiny.make_tokenizer(), **settings)


def row(*images, turn=None) -> dict:
    return {"messages": [turn or tiny.ask("5 6"), ANSWER], "images": list(images)}


def test_examples_with_images_are_made_anew_and_those_without_are_kept(folder, monkeypatch):
    """Of the same file a model of text keeps the rows without images, and drops the others."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(loading, "MIN_KEPT_BYTES", 0)
    plain = {"messages": [{"role": "user", "content": "5 6"}, ANSWER]}
    rows = row("a.png"), plain
    kept = [len(load(folder, *rows, processor=None)) for _ in range(2)]
    assert kept == [1, 1]
    assert [len(load(folder, *rows)) for _ in range(2)] == [2, 2]
    names = [path.suffix for path in (folder / "cache" / "posttrain").iterdir() if path.is_dir()]
    assert names == [""]


def test_an_image_takes_as_many_tokens_as_its_grid_where_the_template_shows_it(folder):
    (document,) = load(folder, row("a.png"))
    ids = document["input_ids"]
    words = f"<|im_start|> user <|vision_start|>{' <|image_pad|>' * OF_ONE} <|vision_end|> 5 6"
    words += " <|im_end|> <|im_start|> assistant 7 8 <|im_end|>"
    assert ids == [tiny.WORDS.index(word) for word in words.split()]
    assert document["trained"] == [False] * (len(ids) - 3) + [True] * 3
    (image,) = document["images"]
    assert (image["path"], image["bytes"]) == (str(folder / "a.png"), None)


def test_marks_in_a_text_are_places_like_parts(folder):
    turn = {"role": "user", "content": "<image> 5 6"}
    parts, marks = (load(folder, row("a.png", turn=t))[0] for t in (None, turn))
    assert parts == marks


def test_places_in_later_turns_and_histories_take_the_next_images(folder):
    before = [tiny.ask("5 6"), ANSWER]
    long = {"messages": [*before, tiny.ask("9"), ANSWER], "images": ["a.png", "b.png"]}
    (document,) = load(folder, long)
    places = [i for i, token in enumerate(document["input_ids"]) if token == tiny.IMAGE_ID]
    assert len(places) == OF_ONE + 4
    assert sum(document["trained"]) == 6
    assert not any(document["trained"][i] for i in places)


def test_bytes_base64_and_decoded_images_are_the_file(folder):
    from PIL import Image

    data = (folder / "a.png").read_bytes()
    expected = load(folder, row("a.png"))[0]["input_ids"]
    encoded = {"bytes": base64.b64encode(data).decode()}
    (found,) = load(folder, row(encoded))
    assert found["input_ids"] == expected
    assert found["images"][0]["bytes"] == data
    tokenizer = tiny.make_tokenizer()
    processor = partial(load_processor, str(folder / "model"))
    for image in ({"bytes": data, "path": "a.png"}, data, Image.open(folder / "a.png")):
        (found,) = load_documents([row(image)], tokenizer, template="chat", processor=processor)
        assert found["input_ids"] == expected


def test_pairs_and_prompts_have_their_images(folder):
    turns = [tiny.ask("5 6")]
    sides = {"chosen": [tiny.answer("7")], "rejected": [tiny.answer("8")]}
    (pair,) = load(folder, {"prompt": turns, "images": ["a.png"]} | sides, how=load_pairs)
    (prompt,) = load(
        folder, {"prompt": turns, "images": ["a.png"], "answer": "7"}, how=load_prompts
    )
    assert pair["prompt_ids"] == prompt["prompt_ids"]
    assert pair["prompt_ids"].count(tiny.IMAGE_ID) == OF_ONE
    assert len(pair["images"]) == len(prompt["images"]) == 1
    assert prompt["prompt"].count("<|image_pad|>") == 1  # for rewards and people: one for each


def test_rows_without_images_stand_beside_rows_with_them(folder):
    found = load(folder, row("a.png"), row(turn=tiny.ask("5", 0)))
    assert [len(images) for images in found["images"]] == [1, 0]
    assert "images" not in load(folder, row(turn=tiny.ask("5", 0))).column_names


def test_a_document_that_is_too_long_is_dropped_not_cut_within_an_image(folder):
    said = []
    found = load(folder, row("a.png"), row("b.png"), max_length=16, say=said.append)
    assert [len(each["input_ids"]) for each in found] == [16]
    assert "dropped 1: 1 longer than 16 tokens" in said[0]


def test_image_tokens_that_a_user_spells_out_stay_text(folder):
    (document,) = load(folder, row("b.png", turn=tiny.ask("<|image_pad|> 5")))
    assert document["input_ids"].count(tiny.IMAGE_ID) == 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("cut.png"), "'images[0]' does not decode as an image"),
        (row("text.png"), "'images[0]' does not decode as an image"),
        (row("gone.png"), "'images[0]' names the file"),
        (row("https://a.b/c.png"), "'images[0]' is the URL https://a.b/c.png; nothing is fetched"),
        (row("a.png", "b.png"), "'images' holds 2, and the user's turns have 1 places"),
        (row("a.png", turn=tiny.ask("5", 2)), "'images' holds 1, and the user's turns have 2"),
        (row("a.png", turn=tiny.ask("5", 0)), "'images' holds 1, and the user's turns have 0"),
        (row(turn=tiny.ask("5")), "'messages[0]' has an image, and the row has none"),
        (row(7), "'images[0]' is a number; expected a path"),
        (row({"bytes": "?"}), "'images[0].bytes' is not base64"),
        (row() | {"images": "a.png"}, "'images' is text (a.png); expected a list of images"),
        (row("line.png"), "refuses: absolute aspect ratio must be smaller than 200"),
        (
            row("a.png", turn={"role": "user", "content": [{"type": "image", "image": "a.png"}]}),
            "'messages[0]' has an image, and names it itself, in 'image'",
        ),
        (
            row("a.png") | {"messages": [tiny.ask("5", 0), tiny.ask("6") | {"role": "assistant"}]},
            "a turn of the role assistant has an image",
        ),
    ],
)
def test_a_bad_image_is_one_line_with_file_row_field_and_remedy(folder, bad, message):
    with pytest.raises(DataError) as found:
        load(folder, row("b.png"), bad)
    text = str(found.value)
    assert f"{folder / 'rows.jsonl'}, row 2: " in text
    assert message in text
    assert "\n" not in text
    assert text.endswith(".")


def test_a_model_of_text_with_images_is_refused_with_file_and_row(folder, tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tiny.write_rows(folder / "rows.jsonl", [row("a.png")])
    processor = partial(load_processor, str(tmp_path))
    with pytest.raises(DataError, match=r"row 1: 'images' holds images, and .* has no processor"):
        load_documents(path, tiny.make_tokenizer(), template="chat", processor=processor)


def test_a_template_without_a_place_for_images_is_refused(folder):
    with pytest.raises(ConfigError, match="for which the template 'plain' has no place"):
        load(folder, row("a.png"), template="plain")


def test_a_chat_template_that_leaves_images_out_is_refused(folder):
    blind = tiny.CHAT.replace("<|image_pad|>", "")
    path = tiny.write_rows(folder / "rows.jsonl", [row("a.png")])
    processor = partial(load_processor, str(folder / "model"))
    with pytest.raises(DataError, match="the chat template writes 0 image tokens"):
        load_documents(path, tiny.make_tokenizer(blind), template="chat", processor=processor)


def test_without_pillow_one_line_says_what_to_install(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: found(n, *a) if n != "PIL" else None
    )
    with pytest.raises(DataError, match=r"row 1: .*pip install 'posttrain\[vision\]'"):
        load(folder, row("a.png"))


def test_a_packed_model_of_text_refuses_a_batch_with_images(folder):
    from posttrain.packed.prepare import prepare

    model = make_model(vocab_size=len(tiny.WORDS))
    prepare(model)
    batch = pack_documents(load(folder, row("a.png")), device="cpu")
    for way in ("sdpa", "rows"):
        prepare(model, attn_implementation=way)
        with pytest.raises(ConfigError, match=r"load_model\(config, images=True\)"):
            packed_logps(model, batch)


def test_a_kernel_that_packs_is_refused_with_images(folder):
    config = ModelConfig(model_name_or_path=str(folder / "model"), attn_implementation="sdpa")
    with pytest.raises(ConfigError, match="expected auto or rows with images"):
        load_model(config, images=True)


def test_an_image_that_changes_is_an_error_in_the_run_and_other_data_for_a_resumed_dpo(folder):
    from posttrain.packed.vision import opened
    from posttrain.trainers.preference import fingerprint

    sides = {"chosen": [tiny.answer("7")], "rejected": [tiny.answer("8")]}
    pair = {"prompt": [tiny.ask("5")], "images": ["new.png"]} | sides
    found = []
    for seed in (3, 4):
        tiny.save_image(folder / "new.png", (16, 16), seed=seed)
        found.append(load(folder, pair, how=load_pairs))
    before, after = found
    assert before["prompt_ids"] == after["prompt_ids"]
    assert fingerprint(before) != fingerprint(after)
    assert opened(after[0]["images"][0]).size == (16, 16)
    with pytest.raises(DataError, match=r"new\.png has changed since the data was read"):
        opened(before[0]["images"][0])
    (folder / "new.png").unlink()
    with pytest.raises(DataError, match=r"new\.png cannot be read any more"):
        opened(before[0]["images"][0])


def test_prompts_with_images_are_refused_by_a_generator_of_a_text_model():
    from posttrain.packed.prepare import prepare
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.sampling import Sampling

    model = make_model()
    prepare(model)
    with pytest.raises(ConfigError, match="the prompts have images"):
        HFGenerator(model).generate([[5, 6]], Sampling(2, (1,)), images=[[{"path": "a.png"}]])


def test_a_mark_without_an_image_is_refused_among_rows_with_images(folder):
    bare = {"messages": [{"role": "user", "content": "<image> 5 6"}, ANSWER], "images": []}
    with pytest.raises(DataError, match="row 2: 'images' holds 0, and the user's turns have 1"):
        load(folder, row("a.png"), bare)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ("iVBORw0KGgo" * 800, "names the file"),
        ({"bytes": [137, 80]}, "expected bytes, or their base64"),
        ({"bytes": "é"}, "is not base64"),
    ],
)
def test_what_is_no_image_is_named_with_its_row(folder, image, complaint):
    with pytest.raises(DataError, match=f"row 1: .*{complaint}"):
        load(folder, row(image))


def test_a_broken_image_of_a_dataset_is_found_with_its_row(folder):
    names = ("a", "cut")
    images = [[{"path": None, "bytes": (folder / f"{n}.png").read_bytes()}] for n in names]
    questions = {"question": ["<image> 5", "<image> 6"], "answer": ["7", "8"]}
    rows = datasets.Dataset.from_dict({**questions, "images": images})
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    processor = partial(load_processor, str(folder / "model"))
    with pytest.raises(DataError, match=r"row 2: 'images\[0\]' does not decode"):
        load_documents(rows, tiny.make_tokenizer(), template="chat", processor=processor)


def test_a_template_that_takes_parts_alone_renders_texts(folder):
    """As those of LLaVA and Idefics3, which loop over a turn's content."""
    tokenizer = tiny.make_tokenizer()
    parts = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{% for p in m['content'] %}"
        "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    tokenizer.chat_template = parts
    path = tiny.write_rows(folder / "text.jsonl", [{"question": "5 6", "answer": "7 8"}])
    (document,) = load_documents(path, tokenizer, template="chat", say=lambda _: None)
    assert sum(document["trained"]) == 3


def test_a_template_beside_the_processor_is_found(folder):
    files = folder / "beside"
    shutil.copytree(folder / "model", files)
    template = (files / "chat_template.jinja").read_text()
    (files / "chat_template.jinja").unlink()
    (files / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(str(files)).chat_template == template
