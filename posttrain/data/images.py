"""Images in conversations: the column `images`, and the places where a chat template shows them.

    images = ImageReader(processor)
    example = images.placed(row, example)       # each image stands at one place of a user's turn
    renderer = images.rendering(renderer)       # its texts hold the tokens that each image takes

An image is a path (beside the data file, or absolute), `{"path": …}`, or `{"bytes": …}`: bytes, or
their base64 in JSON. Each is opened once, before training, so that one that is missing or broken
is an error with its file and row. Pixels are computed when they are needed: a data set holds paths.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.example import IMAGE, Example, Segment
from posttrain.data.read import Row, kind_of
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from posttrain.data.render import Renderer

GetProcessor = Callable[[], Any]  # gives a transformers.ProcessorMixin
# path: str or None, bytes: bytes or None, one of which is there; sha256: of the file's content.
Reference = dict[str, Any]
MARK = "<image>"  # how texts say where an image stands
URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
PLACES = f'{{"type": "image"}} or {MARK}'


def undecoded(rows: Dataset) -> Dataset:
    """A dataset with its images as they were stored: a broken one is then found with its row."""
    import datasets

    feature = getattr(rows, "features", {}).get("images")
    if not isinstance(getattr(feature, "feature", None), datasets.Image):
        return rows
    return rows.cast_column("images", type(feature)(datasets.Image(decode=False)))


class ImageReader:
    """Reads the column `images` for a model.

    processor: gives the model's processor, and raises ConfigError for a model that has none; called
        at the first row with images.
    """

    def __init__(self, processor: GetProcessor) -> None:
        self._load, self._processor = processor, None

    def are_named(self, example: Example) -> bool:
        """True where a text says that images stand in it."""
        return any(MARK in turn["content"] for turn in example.turns if turn["role"] == "user")

    def placed(self, row: Row, example: Example) -> Example:
        """The example with its images, each at an IMAGE of a user's turn.

        Raises DataError for an image that cannot be opened, and unless there are as many places.
        """
        self._find_processor(row)
        images = tuple(_reference(row, f"images[{i}]", x) for i, x in enumerate(_column(row)))
        turns = example.joined_turns
        if not any(IMAGE in turn["content"] for turn in (*turns, *example.answers)):
            turns = tuple(_with_places(turn) for turn in turns)
        for turn in (*turns, *example.answers):
            if turn["role"] != "user" and IMAGE in turn["content"]:
                raise DataError(
                    f"{row.where}: a turn of the role {turn['role']} has an image; expected images "
                    "in turns of the user alone. Move it there."
                )
        places = sum(turn["content"].count(IMAGE) for turn in turns)
        if places != len(images):
            raise DataError(
                f"{row.where}: 'images' holds {len(images)}, and the user's turns have {places} "
                f"places for images ({PLACES}). Expected one place for each, in their order."
            )
        return replace(example, turns=turns, input="", texts=None, images=images)

    def rendering(self, renderer: Renderer) -> Renderer:
        """The renderer, with every image's tokens in its texts.

        It raises ConfigError for an example with images where it has no place for them.
        """
        return ImageRenderer(self, renderer)

    def _find_processor(self, row: Row) -> None:
        if self._processor is None:
            try:
                self._processor = self._load()
            except ConfigError as error:
                raise DataError(f"{row.where}: 'images' holds images, and {error}") from None

    def expanded(self, example: Example, texts: Sequence[str]) -> list[str]:
        """The texts of one rendered example with the tokens that its images take.

        Raises DataError unless the template wrote one image token for each image.
        """
        if not example.images:
            return list(texts)
        token = self._processor.image_token
        pieces = [text.split(token) for text in texts]
        found = sum(map(len, pieces)) - len(pieces)
        if found != len(example.images):
            raise DataError(
                f"{example.where}: the chat template writes {found} image tokens ({token}) for "
                f"{len(example.images)} images. Where it leaves out turns, or renders earlier ones "
                "otherwise, write the conversation as several rows; else take the model's own "
                "template."
            )
        tokens = iter(self._tokens(example))
        return [p[0] + "".join(next(tokens) + rest for rest in p[1:]) for p in pieces]

    def collapsed(self, text: str) -> str:
        """A rendered text for people and rewards: one token stands for the many of an image."""
        if self._processor is None:
            return text
        token = re.escape(self._processor.image_token)
        return re.sub(rf"({token})(?:\s*{token})+", r"\1", text)

    def _tokens(self, example: Example) -> list[str]:
        """The text that each image becomes; this decodes and processes it as training will."""
        images = [
            _opened(f"{example.where}: 'images[{place}]'", reference)
            for place, reference in enumerate(example.images)
        ]
        text = self._processor.image_token * len(images)
        try:
            found = self._processor(
                text=[text], images=images, return_text_replacement_offsets=True
            )
        except (ValueError, TypeError, IndexError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{example.where}: 'images' holds an image that {type(self._processor).__name__} "
                f"refuses: {reason}. Resize it, or leave the row out."
            ) from None
        return [each["replacement"] for each in found["text_replacement_offsets"][0]]


class ImageRenderer:
    """A chat template whose texts hold the tokens of images; see posttrain.data.render.Renderer."""

    def __init__(self, images: ImageReader, renderer: Renderer) -> None:
        self.images, self.renderer = images, renderer
        self.name, self.adds_bos = renderer.name, renderer.adds_bos
        self.rules, self.noted = renderer.rules, renderer.noted

    def prompt(self, example: Example) -> str:
        """The text that the completion follows."""
        self._check(example)
        (text,) = self.images.expanded(example, [self.renderer.prompt(example)])
        return text

    def answers(self, example: Example) -> list[str]:
        """The text of each completion, which has no images."""
        return self.renderer.answers(example)

    def documents(self, example: Example) -> list[list[Segment]]:
        """Prompt and completion as documents; each has all of the row's images."""
        self._check(example)
        return [self._expanded(example, segments) for segments in self.renderer.documents(example)]

    def _check(self, example: Example) -> None:
        if example.images and self.name != "chat":
            raise ConfigError(
                f"{example.where}: 'images' holds images, for which the template '{self.name}' has "
                "no place. Use template 'chat', with a model whose tokenizer has a chat template."
            )

    def _expanded(self, example: Example, segments: list[Segment]) -> list[Segment]:
        texts = self.images.expanded(example, [segment.text for segment in segments])
        return [s._replace(text=text) for s, text in zip(segments, texts, strict=True)]


def _column(row: Row) -> list[object]:
    images = row.values.get("images") or []
    if not isinstance(images, (list, tuple)):
        raise row.wrong_type("images", images, "a list of images (paths, or {path} or {bytes})")
    return list(images)


def _with_places(turn: dict[str, Any]) -> dict[str, Any]:
    is_user = turn["role"] == "user"
    return {**turn, "content": turn["content"].replace(MARK, IMAGE)} if is_user else turn


def _reference(row: Row, place: str, image: object) -> Reference:
    """Find out where the image is, as a Reference; DataError for what cannot be read."""
    found = image if isinstance(image, dict) else {"path": image}
    path, data = found.get("path"), found.get("bytes")
    if isinstance(path, (bytes, bytearray)):
        path, data = None, path
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise DataError(f"{row.where}: '{place}.bytes' is not base64 ({error}).") from None
    if hasattr(image, "save"):  # decoded by datasets
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = buffer.getvalue()
    if data is not None and not isinstance(data, (bytes, bytearray)):
        raise row.wrong_type(f"{place}.bytes", data, "bytes, or their base64")
    if data:
        return {"path": None, "bytes": bytes(data), "sha256": hashlib.sha256(data).hexdigest()}
    if not isinstance(path, str) or not path:
        raise DataError(
            f"{row.where}: '{place}' is {kind_of(image)}; expected a path, {{\"path\": …}} or "
            '{"bytes": …}.'
        )
    if URL.match(path):
        raise DataError(
            f"{row.where}: '{place}' is the URL {path[:60]}; nothing is fetched in a run. Save the "
            "image to a file, and name its path."
        )
    file = Path(row.file).parent / Path(path).expanduser()
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{row.where}: '{place}' names the file {str(file)[:120]}: {reason}. Paths count from "
            'the data file\'s folder; base64 stands in {"bytes": …}. Mend it, or leave the row out.'
        ) from None
    return {"path": str(file.resolve()), "bytes": None, "sha256": digest}


def _opened(where: str, reference: Reference) -> Any:
    """The decoded image, upright and in RGB, as transformers loads one."""
    from PIL import Image
    from transformers.image_utils import load_image

    source = io.BytesIO(reference["bytes"]) if reference["bytes"] else reference["path"]
    try:
        with Image.open(source) as image:
            return load_image(image)
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where} does not decode as an image ({str(error)[:80]}). Repair the file, or leave "
            "the row out."
        ) from None
