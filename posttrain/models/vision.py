"""Vision-language models: their processor, and the whole model ready for data with images.

    processor = load_processor(config.model_name_or_path)
    model = with_vision(model, config.model_name_or_path)    # by posttrain.models.load

Everything here reads images alone, no video: so Pillow is enough where transformers has an image
processor for it, and torchvision is needed where it has none.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from posttrain.errors import ConfigError, PosttrainError
from posttrain.models.lora import base_of
from posttrain.packed.vision import VisionInputs, check_images
from posttrain.run.engine import is_sharded
from posttrain.run.options import say

if TYPE_CHECKING:
    from posttrain.run.settings import ModelConfig

VIDEO = "video_processor"
# What a processor is read from, besides the tokenizer.
FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def load_processor(name: str) -> Any:
    """Load a model's processor for text and images.

    Raises ConfigError for a model that has none, and where a package is missing.
    """
    name = base_of(name)
    try:
        processor = _processor(name)
    except PosttrainError:
        raise
    except Exception as error:  # whatever a library thinks of a broken or missing file
        reason = str(error).strip().partition("\n")[0]
        remedy = " It needs torchvision: pip install torchvision." * ("orchvision" in str(error))
        raise ConfigError(
            f"--model_name_or_path: cannot load the processor of {name}: {reason}{remedy}"
        ) from error
    if getattr(processor, "image_token", None) is None:
        raise ConfigError(
            f"--model_name_or_path: the {type(processor).__name__} of {name} has no image token, "
            "so images have no place in a text. Take another vision-language model."
        )
    return processor


def _processor(name: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(name)), None)
    if kind is None:
        raise ConfigError(
            f"--model_name_or_path: {name} has no processor, so it sees no images. Take a "
            "vision-language model, or data without the column 'images'."
        )
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError(
            "images need the package pillow, which is not installed. Install it: pip install "
            "'posttrain[vision]'."
        )
    return _of_images(kind).from_pretrained(name)


def _of_images(kind: type) -> type:
    """The processor class without a video processor, which torchvision alone could make.

    The same class where its constructor insists on one.
    """

    video = inspect.signature(kind.__init__).parameters.get(VIDEO)
    if video is None or video.default is video.empty:
        return kind
    names = [name for name in kind.get_attributes() if name != VIDEO]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: names)})


def load_class() -> type:
    """The transformers class that loads a whole vision-language model."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText


def by_rows(config: ModelConfig) -> ModelConfig:
    """The settings with the one way in which rows with images are computed; ConfigError for others.

    DeepSpeed and FSDP would wait in the layers that see images for a rank whose rows have none.
    """
    if config.attn_implementation not in ("auto", "rows"):
        raise ConfigError(
            f"--attn_implementation: expected auto or rows with images, found "
            f"{config.attn_implementation}, which packs."
        )
    if is_sharded():
        raise ConfigError(
            "images: expected one process or plain DDP, found DeepSpeed or FSDP. Use "
            "accelerate_configs/ddp.yaml."
        )
    return replace(config, attn_implementation="rows")


def with_vision(model: nn.Module, name: str) -> nn.Module:
    """Give a model what turns images into its inputs, before it is made ready for batches."""
    model.vision_inputs = VisionInputs(load_processor(name), _files_of(base_of(name)))
    return model


def check_vision(model: nn.Module) -> None:
    """Raise ConfigError unless rows with images score as in the model's plain forward."""
    words = [i for i in range(2, 64) if i not in model.vision_inputs.placeholders][:9]
    check_images(model, words)
    say(f"images  are seen by {type(model).__name__}: the data has some, so all of it was loaded")


def _files_of(name: str) -> list[Path]:
    from transformers.utils import cached_file

    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    found = [cached_file(name, file, **quiet) for file in FILES]
    return [Path(path) for path in found if path]
