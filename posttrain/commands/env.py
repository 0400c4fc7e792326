"""`posttrain env`: versions, processor and GPUs, to paste into an issue."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.run.options import plain_errors, say, set_up_libraries

# Processor features that decide which kernels of torch run.
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "sve"),
)
GIB = 2**30


def main(argv: Sequence[str]) -> None:
    """Print one fact a line."""
    if argv and argv[0] in ("--help", "-h"):
        print("usage: posttrain env\n\nVersions, processor and GPUs, to paste into an issue.")
        return
    with plain_errors():
        if argv:
            raise ConfigError(f"env: expected no argument, found '{argv[0]}'.")
        set_up_libraries()
        for name, value in facts():
            say(f"{name:14}{value}")


def facts() -> Iterator[tuple[str, str]]:
    """Yield what another person needs to see a problem again; no path and no user name."""
    import torch

    from posttrain.run.engine import describe_environment

    found = describe_environment()
    packages = dict(found["packages"])
    yield "posttrain", " ".join(filter(None, (packages.pop("posttrain", "?"), found["git"])))
    yield "python", found["python"]
    yield "platform", found["platform"]
    yield from packages.items()
    yield "cpu", f"{found['cpu']}, {found['cpu_cores']} cores, {torch.get_num_threads()} threads"
    yield "cpu flags", " ".join(cpu_flags()) or "unknown"
    yield "memory", f"{memory_bytes() / GIB:.1f} GiB"
    yield "cuda", torch.version.cuda or "none in this torch"
    for number, gpu in enumerate(found["gpus"]):
        about = torch.cuda.get_device_properties(number)
        size = f"{about.total_memory / GIB:.0f} GiB, compute capability {about.major}.{about.minor}"
        yield f"gpu {number}", f"{gpu}, {size}"
    if not found["gpus"]:
        yield "gpus", "none"


def cpu_flags(info: Path = Path("/proc/cpuinfo")) -> list[str]:
    """List those of FLAGS that this processor has; none where the system does not tell."""
    if not info.is_file():
        return []
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            has = set(line.partition(":")[2].split())
            return [flag for flag in FLAGS if flag in has]
    return []


def memory_bytes() -> int:
    """Return the machine's memory in bytes; 0 where the system does not tell."""

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
