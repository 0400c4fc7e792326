"""Merging models of one architecture into one, tensor by tensor: averages in weight space.

    merge_models(["long", "short"], "merged", partial(linear, weights=(0.5, 0.5)))

Reads and writes safetensors in pieces: memory holds one tensor of each model and one output file's
worth, never a whole model. Sums are taken in float32; each result has the first model's number
format.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.run.engine import atomic_folder

if TYPE_CHECKING:
    from safetensors import safe_open

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
PARALLEL = 1e-4  # 1 - |cosine| below which two weights lie on one line, and there is no arc

Combine = Callable[[Sequence[Tensor]], Tensor]


def linear(tensors: Sequence[Tensor], *, weights: Sequence[float]) -> Tensor:
    """Weighted sum of the models: sum_i w_i θ_i, with one weight for each; they are not normalised.

    By hand: (0.5, -1) and (1.5, 1) with weights 0.5, 0.5 give (1, 0).
    Source: Model soups (arXiv 2203.05482) Eq. 1; Kimi k1.5 (2501.12599) section 2.4 with 0.5, 0.5.
    """
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))


def slerp(tensors: Sequence[Tensor], *, t: float) -> Tensor:
    """Spherical interpolation of two models: [sin((1-t) ω) θ_0 + sin(t ω) θ_1] / sin ω.

    ω is the angle between the two tensors as vectors. t in [0, 1]: 0 is the first model. Two of
    equal norm keep it, whereas their mean is shorter; tensors that lie on one line, or are 0, are
    averaged. By hand: (1, 0) and (0, 1) at t = 0.5 give
    (0.7071, 0.7071). Source: Shoemake, "Animating rotation with quaternion curves" (1985).
    """
    first, second = tensors
    norms = first.norm() * second.norm()
    cosine = (first.flatten() @ second.flatten() / norms).clamp(-1, 1) if norms else torch.ones(())
    if 1 - cosine.abs() < PARALLEL:
        return (1 - t) * first + t * second
    angle = cosine.arccos()
    return (((1 - t) * angle).sin() * first + (t * angle).sin() * second) / angle.sin()


def task_arithmetic(tensors: Sequence[Tensor], *, weights: Sequence[float]) -> Tensor:
    """Add weighted differences to a base: θ_0 + sum_i w_i (θ_i - θ_0).

    The first model is the base that the others were trained from, and each weight belongs to one
    of the others. A negative weight takes a skill away. By hand: base 1, others 3 and 0 with
    weights 1 and 0.5 give 1 + 2 - 0.5 = 2.5.
    Source: Editing models with task arithmetic (arXiv 2212.04089).
    """
    base, *others = tensors
    moved = (w * (other - base) for w, other in zip(weights, others, strict=True))
    return base + sum(moved)


def merge_models(
    models: Sequence[str | Path],
    output: str | Path,
    combine: Combine,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Merge the models' tensors into the folder `output`, and return the number of tensors.

    Configuration, tokenizer and chat template are the first model's.

    Args:
        models: folders with safetensors.
        combine: f(the models' tensors of one name, in float32) -> tensor of the same shape.
        shard_bytes: size above which another output file begins.

    Raises:
        ConfigError: for folders without safetensors, tensors or shapes that differ, or an output
            folder that exists.
    """
    folders = [Path(model) for model in models]
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output}: exists already, and is not overwritten. Name another folder.")
    # The readers keep their files open and map them; the stack closes them all, also on an error.
    with ExitStack() as stack:
        readers = [_Reader(folder, stack) for folder in folders]
        _check_alike(readers)
        with atomic_folder(output) as partial:
            _copy_the_rest(folders[0], partial)
            _write(partial, _merged(readers, combine), shard_bytes)
    return len(readers[0].files)


class _Reader:
    """Tensors of a model folder by name, read only on request."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import safe_open

        self.folder = folder
        if (folder / INDEX).is_file():
            files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            opened = dict.fromkeys(sorted(set(files.values())))
        elif (folder / "model.safetensors").is_file():
            files, opened = None, {"model.safetensors": None}
        else:
            raise ConfigError(
                f"{folder}: expected a model folder with model.safetensors. (An adapter has to be "
                "merged into its model first.)"
            )
        for file in opened:
            opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
        names = files or dict.fromkeys(opened["model.safetensors"].keys(), "model.safetensors")
        self.files: dict[str, safe_open] = {name: opened[file] for name, file in names.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in the dtype that it was saved in."""
        return self.files[name].get_tensor(name)


def _check_alike(readers: Sequence[_Reader]) -> None:
    first, *others = readers
    for other in others:
        odd = sorted(first.files.keys() ^ other.files.keys())
        if odd:
            where = first.folder if odd[0] in first.files else other.folder
            raise ConfigError(
                f"{first.folder} and {other.folder} differ in {len(odd)} tensors: {odd[0]!r} is "
                f"in {where} only. Only models of one architecture can be merged."
            )
        for name in first.files:
            if first.shape(name) != other.shape(name):
                raise ConfigError(
                    f"{name!r} has the shape {first.shape(name)} in {first.folder} and "
                    f"{other.shape(name)} in {other.folder}; expected equal ones."
                )


def _merged(readers: Sequence[_Reader], combine: Combine) -> Iterator[tuple[str, Tensor]]:
    for name in readers[0].files:
        tensors = [reader.tensor(name) for reader in readers]
        dtype = tensors[0].dtype
        if dtype.is_floating_point:
            merged = combine([tensor.float() for tensor in tensors]).to(dtype)
        else:  # counters and masks: nothing to average
            merged = tensors[0]
        yield name, merged.contiguous()


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors as transformers lays a model out: one file, or several with an index."""
    from safetensors.torch import save_file

    written: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = folder / f"{len(written)}.part"
        save_file(shard, path, metadata={"format": "pt"})
        written.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    # Names hold the number of files, which is known only now.
    weight_map = {}
    for number, (path, names) in enumerate(written, start=1):
        file = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_the_rest(source: Path, target: Path) -> None:
    for path in source.iterdir():
        is_weight = path.suffix in (".safetensors", ".bin", ".pt") or path.name == INDEX
        if path.is_file() and not is_weight and path.name != "README.md":
            shutil.copy2(path, target / path.name)
