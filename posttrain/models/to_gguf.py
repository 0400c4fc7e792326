"""A saved model as a GGUF file, written by llama.cpp's own converter.

    convert(Path("runs/sft/model"), Path("model.gguf"), Path("runs/gguf"), outtype="f32")

The converter comes with the source of llama-cpp-python, and is fetched into a folder once. Needs
the extra `gguf`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from posttrain.errors import ConfigError, PosttrainError

CONVERTER = "llama_cpp_python==0.3.36"
PACKAGES = ("xllamacpp==2026.10.11549", "sentencepiece==0.2.3")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


class ConversionError(PosttrainError):
    """The converter refused a model, or llama.cpp computes something else than we do."""


def install(folder: Path) -> Path:
    """Fetch converter and llama.cpp, once, and return the converter."""
    if not (folder / "installed").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        _pip("download", *source, CONVERTER)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        packages = ["--no-deps", "--upgrade", "--target", str(folder / "packages")]
        _pip("install", *packages, *PACKAGES)
        (folder / "installed").touch()
    (converter,) = folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    return converter


def _pip(*arguments: str) -> None:
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or [f"status {done.returncode}"])[-1]
        raise ConversionError(f"pip cannot {arguments[0]} {arguments[-1]}: {reason}")


def convert(model: Path, target: Path, folder: Path, *, outtype: str = "f32") -> None:
    """Write the model as GGUF.

    Args:
        folder: where the converter is kept.
        outtype: the converter's name of the number format, such as f32, bf16 or auto.

    Raises:
        ConfigError: the target exists.
        ConversionError: the converter cannot be fetched, or does not take the model.
    """
    if target.exists():
        raise ConfigError(f"--output: {target} exists. Name another file, or remove it.")
    part = target.with_suffix(".part")
    command = [sys.executable, str(install(folder)), str(model), "--outtype", outtype]
    done = with_packages([*command, "--outfile", str(part)], folder)
    if done.returncode:
        part.unlink(missing_ok=True)
        complaint = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConversionError(
            f"llama.cpp's converter does not take {model} (status {done.returncode}): {complaint}"
        )
    part.rename(target)


def with_packages(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that finds the packages of `folder` first."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "packages")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
