"""Give a model that sees images its inputs beside the ids of its rows.

    model.vision_inputs = VisionInputs(processor, files)     # by posttrain.models.vision
    inputs = model.vision_inputs.of_rows(model, ids, images) # pixel_values, image_grid_thw, …

The model's own processor computes the pixels when a batch is formed, so that a data set holds paths
and no pixels; the model's own forward then finds its positions (M-RoPE) from ids, mask and grids.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError, DataError
from posttrain.packed.batch import Segment, pack
from posttrain.packed.forward import in_evaluation, packed_logps

# path: str or None, bytes: bytes or None, one of which is there; perhaps sha256 of the content.
Reference = Mapping[str, Any]
# Outputs of a processor that belong to the text it was given, which is not that of the rows.
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
TYPES = ("mm_token_type_ids", "token_type_ids")  # what families call the kind of each token
TOLERANCE = 2e-4  # nats, as for packed attention (posttrain.packed.prepare)
PROBE_SIZES = (40, 56), (96, 32)  # pixels of the images that a model is tried with


class VisionInputs:
    """Turns the images of rows into arguments of the model's forward.

    processor: the model's. files: those that the processor was read from, to be saved beside the
    model. placeholders: ids that stand for images and videos, which no completion may hold.
    """

    def __init__(self, processor: Any, files: Sequence[Path] = ()) -> None:
        self.processor, self.files = processor, list(files)
        self._latest: dict[tuple, dict[str, Tensor]] = {}
        names = ("image_token_ids", "video_token_ids", "image_token_id", "video_token_id")
        found = [getattr(processor, name, None) for name in names]
        flat = [i for ids in found for i in (ids if isinstance(ids, (list, tuple)) else [ids])]
        self.placeholders = sorted({i for i in flat if isinstance(i, int)})

    def of_rows(
        self, model: nn.Module, ids: Tensor, images: Sequence[Sequence[Reference]]
    ) -> dict[str, Tensor]:
        """Return what the model takes beside (r, L) ids and their mask.

        images: those of each row in the order of their places.
        """
        takes = inspect.signature(model.forward).parameters
        inputs = {}
        if getattr(self.processor, "return_mm_token_type_ids", False):
            kinds = self.processor.create_mm_token_type_ids(ids.tolist())
            name = next((name for name in TYPES if name in takes), None)
            inputs = {name: torch.tensor(kinds, device=ids.device)} if name else {}
        flat = [image for row in images for image in row]
        seen = self._seen(flat) if flat else {}
        return inputs | {k: v.to(ids.device) for k, v in seen.items() if k in takes}

    @cached_property
    def is_additive(self) -> bool:
        """True where the outputs for several images are those for each, one after the other."""
        images = probe_images()
        together, *alone = (self._processed(part) for part in (images, images[:1], images[1:]))
        shapes = ([value.shape[1:] for value in each.values()] for each in alone)
        if len({tuple(each) for each in shapes}) > 1:
            return False
        return all(torch.equal(v, torch.cat([x[k] for x in alone])) for k, v in together.items())

    def _seen(self, images: Sequence[Reference]) -> dict[str, Tensor]:
        """The processor's outputs for images, each distinct one computed once where they add up."""
        if not self.is_additive:
            return self._processed(images)
        found, keys = {}, [(image["path"], image["bytes"]) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in found:
                found[key] = self._latest.get(key) or self._processed([image])
        self._latest = found  # of one call, so that memory stays bounded
        return {k: torch.cat([found[key][k] for key in keys]) for k in found[keys[0]]}

    def _processed(self, images: Sequence[Reference]) -> dict[str, Tensor]:
        text = self.processor.image_token * len(images)
        opened_images = [opened(image) for image in images]
        found = self.processor(text=[text], images=opened_images, return_tensors="pt")
        return {name: value for name, value in found.items() if name not in OF_TEXT}

    def ids_of(self, images: Sequence[Reference], word: int) -> list[int]:
        """The token ids of these images, each with a word after it: some families need one."""
        ids = []
        for image in images:
            found = self.processor(text=[self.processor.image_token], images=[opened(image)])
            ids += [*found["input_ids"][0], word]
        return ids

    def made_row(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """The inputs of one row that shows a made image."""
        images = probe_images()[:1]
        word = next(i for i in range(2, 64) if i not in self.placeholders)
        ids = torch.tensor([self.ids_of(images, word)], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | self.of_rows(model, ids, [images])

    def save(self, folder: Path) -> None:
        """Copy the processor's files beside a saved model, but for those that are there."""
        for file in self.files:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def opened(reference: Reference) -> Any:
    """The decoded image, upright and in RGB, as transformers loads one.

    Raises DataError where its file is not what it was when the data was read.
    """
    from PIL import Image
    from transformers.image_utils import load_image

    path, data = reference["path"], reference["bytes"]
    try:
        data = data or Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"the image {path} cannot be read any more: {error.strerror}.") from None
    if reference.get("sha256", found := hashlib.sha256(data).hexdigest()) != found:
        raise DataError(f"the image {path} has changed since the data was read. Put it back.")
    with Image.open(io.BytesIO(data)) as image:
        return load_image(image)


def probe_images() -> list[Reference]:
    """Two made images of different sizes."""
    from PIL import Image

    found = []
    for width, height in PROBE_SIZES:
        buffer = io.BytesIO()
        Image.effect_noise((width, height), 80).convert("RGB").save(buffer, "PNG")
        found.append({"path": None, "bytes": buffer.getvalue()})
    return found


def probe_prompt(model: nn.Module, ids: Sequence[int]) -> tuple[list[int], list[Reference]]:
    """Return a prompt of made images and then of these ids, those for images left out."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    vision, images = model.vision_inputs, probe_images()
    words = [i for i in ids if i not in vision.placeholders]
    return [*vision.ids_of(images, words[0]), *words], images


def check_images(model: nn.Module, words: Sequence[int]) -> None:
    """Raise ConfigError unless rows with images, padded together, score as each does alone.

    words: ids of some text, at least 9, none of which stands for an image.
    """
    device, vision = model.get_input_embeddings().weight.device, model.vision_inputs
    if model.get_input_embeddings().weight.is_meta:
        return
    small, large = probe_images()
    prompts = [([small], words[:2]), ([large, small], words[:5]), ([], words[:4])]
    segments, alone = [], []
    with torch.no_grad(), in_evaluation(model):
        for row, (images, text) in enumerate(prompts):
            prompt, answer = [*vision.ids_of(images, words[0]), *text], words[5:9]
            segments += [Segment(prompt, images=images)]
            segments += [Segment(answer, len(segments) - 1, scored=[True] * 4, row=row)]
            ids = torch.tensor([[*prompt, *answer]], device=device)
            inputs = vision.of_rows(model, ids, [images])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
            logps = logits[0, -5:-1].float().log_softmax(-1)
            alone.append(logps.gather(1, ids[0, -4:, None])[:, 0])
        batch = pack(segments, num_rows=len(prompts), device=device)
        gap = (packed_logps(model, batch).logps - torch.cat(alone)).abs().max().item()
    if not gap <= TOLERANCE:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on images: log-probs of rows in a batch "
            f"differ from those of rows alone by {gap:.2g} nats."
        )
