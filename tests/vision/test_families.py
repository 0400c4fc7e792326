"""Families of vision-language models: each sees what its own processor shows it."""

from functools import partial

import pytest
import torch

from posttrain.data import load_prompts
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.vision import load_processor
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.sampling import Sampling
from posttrain.run.settings import ModelConfig
from tests.vision import tiny
from tests.vision.families import save_family

pytest.importorskip("PIL")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "gemma3", "kimi_k25"])
def test_a_family_samples_and_trains_as_its_plain_model_with_its_own_processor(family, tmp_path):
    if family == "kimi_k25":
        pytest.importorskip("torchvision")
    folder = str(save_family(tmp_path / "model", family))
    for place in range(3):
        tiny.save_image(tmp_path / f"{place}.png", tiny.SIZES[place], seed=place)
    contents = [("<image> 5 6", ["0.png"]), ("<image> 5 <image> 7", ["1.png", "2.png"]), ("8", [])]
    rows = [
        {"prompt": [{"role": "user", "content": text}], "answer": "1", "images": images}
        for text, images in contents
    ]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer, processor = load_tokenizer(folder), partial(load_processor, folder)
    prompts = list(load_prompts(path, tokenizer, template="chat", processor=processor))
    model = load_model(ModelConfig(model_name_or_path=folder), quiet=True, images=True)
    ids, images = [p["prompt_ids"] for p in prompts], [p["images"] for p in prompts]
    drawn = HFGenerator(model).generate(ids, Sampling(4, (tiny.EOS,)), 2, images=images)
    answers = [[c.token_ids for c in siblings] for siblings in drawn]
    batch = pack_groups(ids, answers, device="cpu", images=images)
    found = packed_logps(model.train(), batch).logps
    sampled = torch.tensor([x for siblings in drawn for c in siblings for x in c.logps])
    torch.testing.assert_close(found, sampled, rtol=0, atol=1e-5)
    expected = plain_logps(folder, contents, answers, tmp_path)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-5)


def plain_logps(folder, contents, answers, images_in):
    """Log-probs of the answers by the plain model, each with what the processor makes of it."""
    from PIL import Image
    from transformers import AutoTokenizer

    processor, plain = load_processor(folder), tiny.make_start(folder)
    found = []
    for (content, names), siblings in zip(contents, answers, strict=True):
        pieces = content.split("<image>")
        parts = [{"type": "text", "text": pieces[0]}] * bool(pieces[0])
        for piece in pieces[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": piece}]
        text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        images = [Image.open(images_in / name) for name in names] or None
        inputs = processor(text=[text], images=images, return_tensors="pt")
        for answer in siblings:
            row = dict(inputs) | {"input_ids": torch.tensor([[*inputs["input_ids"][0], *answer]])}
            for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
                if name in row:
                    value = int(name == "attention_mask")
                    row[name] = torch.nn.functional.pad(row[name], (0, len(answer)), value=value)
            with torch.no_grad():
                logps = plain(**row).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(found)
