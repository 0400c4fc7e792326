#!/bin/bash
# transformers: the processor of a Qwen VL model cannot be loaded for images alone without torchvision.
#
# Versions: transformers 5.23.0, pillow 13.0.0, torch 2.13.0; Python 3.11.
# Guess: Qwen2VLImageProcessorPil needs Pillow alone, so AutoProcessor reads images where only Pillow is
#   installed; and two images may follow each other in the ids, since each has its own grid.
# Behaviour: the processor's class has a video processor among its parts, which exists for torchvision
#   alone, and None is no such part. A subclass that leaves the part out of get_attributes loads, and gives
#   the same pixels. In the positions neighbouring image tokens are one image: two without a token between
#   them raise.
# Output seen:
#   AutoProcessor: ImportError, names torchvision
#   without the video processor: 2 images, grids [[1, 4, 8], [1, 2, 12]]
#   positions of two images with a token between: (3, 1, 15)
#   positions of two images side by side: RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 pillow==13.0.0 numpy
cat > "$folder/look.py" << 'PYTHON'
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil, Qwen3VLProcessor,
)

words = ["<unk>", "a", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, additional_special_tokens=words[2:]
).save_pretrained("model")
size = {"shortest_edge": 64, "longest_edge": 1024}
Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size).save_pretrained("model")
text = dict(vocab_size=6, hidden_size=32, num_hidden_layers=1, intermediate_size=32, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2)
vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=4, patch_size=4,
              out_hidden_size=32, deepstack_visual_indexes=[0])
config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision,
                              image_token_id=4, video_token_id=5)
config.save_pretrained("model")

try:
    AutoProcessor.from_pretrained("model")
except Exception as error:
    names = "names torchvision" if "orchvision" in str(error) else "names something else"
    print(f"AutoProcessor: {type(error).__name__}, {names}")


class OfImages(Qwen3VLProcessor):
    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


processor = OfImages.from_pretrained("model")
images = [Image.new("RGB", (30, 20)), Image.new("RGB", (50, 9))]
seen = processor(text=["<|image_pad|>" * 2], images=images, return_tensors="pt")
grids = seen["image_grid_thw"]
print(f"without the video processor: {len(grids)} images, grids {grids.tolist()}")
model = AutoModelForImageTextToText.from_config(config)
for name, between in (("with a token between", [1]), ("side by side", [])):
    ids = torch.tensor([[4] * 8 + between + [4] * 6])
    try:
        found, _ = model.model.get_rope_index(ids, (ids == 4).int(), grids)
        print(f"positions of two images {name}: {tuple(found.shape)}")
    except Exception as error:
        print(f"positions of two images {name}: {type(error).__name__}")
PYTHON
cd "$folder"
venv/bin/python look.py 2> errors | tee seen || { tail -5 errors; exit 1; }
diff seen - << 'SEEN'
AutoProcessor: ImportError, names torchvision
without the video processor: 2 images, grids [[1, 4, 8], [1, 2, 12]]
positions of two images with a token between: (3, 1, 15)
positions of two images side by side: RuntimeError
SEEN
