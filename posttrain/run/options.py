"""Settings of a recipe: a plain dataclass, filled from flags and YAML, checked before torch loads.

    @dataclass
    class Config(ModelConfig, RunConfig):
        dataset: str = option("data/pairs.jsonl", "file, folder or Hub name of the pairs")
        beta: float = option(0.1, "weight of the KL term; larger stays nearer the start", above=0)
        learning_rate: float = 5e-7  # a new default keeps the help and the range of the mixin

    if __name__ == "__main__":
        with plain_errors():
            main(parse(Config))

`--config file.yaml` fills what no flag names. Both go through tyro's converter for the field's
type, so both get the same checks; a mistake is one line with its file and line, or its flag.

A loss with its settings fixed, as recipes do it from flags: `bind(dpo_loss, beta=0.1)`. What a run
has to say goes through `say`, so that other ranks are silent.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import faulthandler
import functools
import inspect
import io
import logging
import math
import os
import signal
import sys
import threading
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import MISSING
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn, Protocol, TextIO, TypeVar

from posttrain.errors import ConfigError, PosttrainError
from posttrain.run.shipped import use_shipped
from posttrain.run.sources import convert, expected, read_flags, read_yaml

ConfigT = TypeVar("ConfigT")
T = TypeVar("T")


class DataclassInstance(Protocol):
    """Any dataclass, such as a recipe's Config."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


HELP_COLUMNS = 100
RANGES = {"at_least": "at least", "above": "above", "at_most": "at most"}


def option(
    default: object = MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    was: str | None = None,
) -> Any:
    """Define a dataclass field with its help (which names the unit) and its range.

    Without a default the setting is required. Without help, a subclass that replaces a field
    keeps the help and the range of the field it replaces.

    Args:
        was: the setting's former name. Flags, YAML files and saved configs may use it for one more
            release; the new name is then printed on stderr.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "was": was}
    metadata: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
    if help:
        metadata["help"] = help
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Read the settings from the command line `argv` (default `sys.argv[1:]`).

    Supported field types: str, int, float, bool, Literal, lists of all but bool, `X | None`, and
    `dict[str, Any]`, which only YAML can fill. Flags are the field names; a boolean is switched
    by `--use_peft`, `--no_use_peft` or `--use_peft true`.

    Exits with status 2 and one line on stderr at the first mistake, with 0 after `--help`.
    """
    argv = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--debug"]
    set_up_libraries()
    if "--help" in argv or "-h" in argv:
        _print_help(config_class)
    with plain_errors():
        return load(config_class, argv)


def load(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Read settings as `parse` does, but raise ConfigError at the first mistake."""
    annotations = typing.get_type_hints(config_class)
    renamed = _former_names(config_class)
    flags = read_flags(argv, annotations, renamed)
    config_file = flags.pop("config", None)
    written = read_yaml(config_file, annotations, renamed) if config_file else {}
    written |= flags

    fields = {f.name: f for f in dataclasses.fields(config_class)}
    values = {
        name: convert(annotations[name], *written[name]) for name in fields if name in written
    }
    for name, field in fields.items():
        is_required = field.default is MISSING and field.default_factory is MISSING
        if is_required and name not in values:
            about = _metadata(config_class, name).get("help", expected(annotations[name]))
            raise ConfigError(f"--{name} is required: {about}.")
    config = config_class(**values)
    use_shipped(config, written)
    validate(config, {name: entry.where for name, entry in written.items()})
    return config


def validate(config: object, places: Mapping[str, str] | None = None) -> None:
    """Check every range, then each `check(self)` that a class of the config defines.

    `places` maps a setting to where it was written. A `check` raises ConfigError with a message
    `setting: expected …, found …`; the setting's place is put in front.
    """
    places = places or {}
    try:
        for name, value in vars(config).items():
            _check_range(name, value, _metadata(type(config), name))
        for cls in reversed(type(config).__mro__):
            if "check" in vars(cls):
                cls.check(config)
    except ConfigError as error:
        name, _, rest = str(error).partition(": ")
        if name not in places:
            raise
        raise ConfigError(f"{places[name]}: {rest}") from None


@contextmanager
def plain_errors() -> Iterator[None]:
    """Run a program inside: mistakes and requests to stop end it with one line, and a status.

    2: an error that the user can fix, such as a wrong setting or a full disk (`--debug` shows the
    traceback). 143, 130, 129: SIGTERM, SIGINT and SIGHUP, unless `on_stop` says otherwise. A reader
    of stdout that goes away ends nothing. Below a launcher, the program ends with it.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) and stream is getattr(sys, f"__{name}__"):  # no test's
            setattr(sys, name, _Lossy(stream))
    _end_with_launcher()
    try:
        # Ranks that wait for each other in C would not come to run a handler.
        with on_stop(_stop_at_once) if "WORLD_SIZE" not in os.environ else nullcontext():
            yield
    except Exception as error:
        if "--debug" in sys.argv or not (message := _plain_message(error)):
            raise
        print(message, file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _plain_message(error: Exception) -> str:
    """The error in one line if the user can mend it, else nothing."""
    if isinstance(error, PosttrainError):
        return str(error)
    first, number = str(error).partition("\n")[0], getattr(error, "errno", None)
    if any(words in first for words in FULL_WORDS) or number in FULL:
        return f"the disk takes no more: {first}. Free some space; what was whole is untouched."
    if not isinstance(error, OSError) or error.filename is None:
        return ""
    return f"{error.filename}: {error.strerror}. What was whole before is untouched."


class _Lossy:
    """A text stream that drops what can no longer be written, as after `| head` or a lost ssh."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """Send the rest nowhere: Python writes what is left in the buffer once more at its end."""
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("failed writing file", "No space left", "File too large", "Disk quota exceeded")
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "POSTTRAIN_STARTED_BY")
ORPHAN_SECONDS = 4.0  # for a last save once the launcher is gone
PR_SET_PDEATHSIG = 1  # Linux's prctl


@contextmanager
def on_stop(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Inside, call `handle` for SIGTERM, SIGINT and SIGHUP, but for those that nohup ignores."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def _end_with_launcher() -> None:
    """Ask Linux for SIGTERM when the launcher ends, be it by kill -9."""
    if sys.platform == "linux" and any(name in os.environ for name in LAUNCHED):
        os.environ["POSTTRAIN_STARTED_BY"] = str(os.getppid())
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_soon_without_launcher() -> None:
    """End this process in ORPHAN_SECONDS if the launcher is gone; call it at a request to stop."""
    launcher = os.environ.get("POSTTRAIN_STARTED_BY")
    has_peers = os.environ.get("WORLD_SIZE", "1") != "1"  # which may never answer
    if has_peers and launcher and int(launcher) != os.getppid():
        # A thread in C, which no held lock of the interpreter can delay.
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open until the end)
        faulthandler.dump_traceback_later(ORPHAN_SECONDS, exit=True, file=nowhere)


def _check_range(name: str, value: object, bounds: Mapping[str, float]) -> None:
    if not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, found {value}.")
    fits = {
        "at_least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at_most": lambda bound: value <= bound,
    }
    for key, words in RANGES.items():
        if key in bounds and not fits[key](bounds[key]):
            raise ConfigError(f"{name}: expected a value {words} {bounds[key]}, found {value}.")


def _metadata(config_class: type, name: str) -> Mapping[str, Any]:
    """Help and range of a field, or of the nearest field it replaces."""
    for cls in config_class.__mro__:
        field = vars(cls).get("__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata:
            return field.metadata
    return {}


def _former_names(config_class: type) -> dict[str, str]:
    """{former name: present name} of every renamed field, inherited ones included."""
    return {
        field.metadata["was"]: name
        for cls in config_class.__mro__
        for name, field in vars(cls).get("__dataclass_fields__", {}).items()
        if "was" in field.metadata
    }


def _own_fields_first(config_class: type) -> list[dataclasses.Field]:
    """Fields that the recipe adds, before those it inherits: a dataclass's own order reversed."""
    mro = [vars(cls).get("__dataclass_fields__", {}) for cls in config_class.__mro__]
    rank = {name: i for i, fields in enumerate(mro) for name in fields}
    return sorted(dataclasses.fields(config_class), key=lambda field: rank[field.name])


def _print_help(config_class: type) -> NoReturn:
    import tyro

    annotations = typing.get_type_hints(config_class)
    about = {"help": "YAML file with any of these settings; flags win"}
    shown = [("config", str | None, dataclasses.field(default=None, metadata=about))]
    about = {"help": "show the traceback of an error"}
    shown.append(("debug", bool, dataclasses.field(default=False, metadata=about)))
    for field in _own_fields_first(config_class):
        if typing.get_origin(annotations[field.name]) is dict:
            continue
        metadata = _metadata(config_class, field.name)
        copy = dataclasses.field(
            default=field.default, default_factory=field.default_factory, metadata=metadata
        )
        shown.append((field.name, annotations[field.name], copy))
    documented = dataclasses.make_dataclass("Settings", shown, kw_only=True)
    module = sys.modules[config_class.__module__]
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        tyro.cli(
            documented,
            args=["--help"],
            description=(module.__doc__ or "").strip().split("\n\n")[0],
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    print("\n".join(_joined(printed.getvalue().splitlines())))
    raise SystemExit(0)


def _joined(lines: Sequence[str]) -> list[str]:
    """tyro's help with a flag and its explanation on one line, where both fit."""
    joined: list[str] = []
    for line in map(str.rstrip, lines):
        if line.startswith("      ") and joined[-1].startswith("  -"):
            together = f"{joined[-1]}  {line.strip()}"
            if len(together) <= HELP_COLUMNS:
                joined[-1] = together
                continue
        joined.append(line)
    return joined


def bind(loss: Callable[..., T], **settings: float | None) -> Callable[..., T]:
    """Fix those settings of a loss that are not None.

    Raises ConfigError for a setting that the loss does not have: it would be ignored.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    parameters = inspect.signature(loss).parameters.values()
    function = loss.func if isinstance(loss, functools.partial) else loss
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--{name}: {function.__name__} has no such setting; "
                f"it has {', '.join(known) or 'none'}."
            )
    return functools.partial(loss, **given)


GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")


def is_main_process() -> bool:
    """Return True on rank 0 of the launch, and if nothing was launched."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print a line at once, on the main process only."""
    if is_main_process():
        print(text, flush=True)


def set_up_libraries() -> None:
    """Quiet the libraries below to errors, and ask torch for large memory pages.

    Programs call it before they import transformers. Variables that the user has set stay.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars heed it too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Fresh pages of 4 KiB can take a third of a step's time on a CPU; Linux only.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not any(Path(device).exists() for device in GPU_DEVICES):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed so
    # PEFT imports bitsandbytes wherever it is installed, and that one misses a package on CPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:  # libraries tell each other what they will rename, at every step
        warnings.simplefilter("ignore", FutureWarning)


def describe_duration(seconds: float) -> str:
    """Format a duration as `01:12`, or from an hour on as `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
