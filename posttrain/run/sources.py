"""Settings as the user wrote them, in flags or YAML, and their conversion to the field's type.

Every value keeps the place where it was written, so that an error can name it. Flags and YAML
meet in one converter, tyro's, which sees text: YAML's own guesses of a type never matter.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from posttrain.errors import ConfigError
from posttrain.run.shipped import shipped_path

if TYPE_CHECKING:
    import yaml

# What YAML 1.1 reads as a boolean, for flags too (`--use_peft true`); tyro knows only the values.
BOOLEANS = dict.fromkeys(("true", "yes", "on"), "True") | dict.fromkeys(
    ("false", "no", "off"), "False"
)
TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "none",
}


class Written(NamedTuple):
    """A value as the user wrote it (text, a list of texts, a mapping or nothing), and its place."""

    value: str | list[str] | dict[str, object] | None
    where: str


def read_flags(
    argv: Sequence[str], annotations: Mapping[str, object], renamed: Mapping[str, str]
) -> dict[str, Any]:
    """Read `--name value …` and `--name=value` into {name: Written}, and `config` into its path.

    Args:
        annotations: the type of each setting.
        renamed: {former name: present name}; a former name is read as the present one.
    """
    grouped: dict[str, list[str]] = {}
    name = ""
    for token in argv:
        if token.startswith("--"):
            flag, has_value, value = token[2:].partition("=")
            name = flag.replace("-", "_")
            grouped[name] = [value] if has_value else []
        elif name:
            grouped[name].append(token)
        else:
            raise ConfigError(f"Expected a flag such as --config FILE, found '{token}'.")
    flags: dict[str, Any] = {}
    for written, tokens in grouped.items():
        name = _present_flag(written, grouped, renamed)
        positive = name.removeprefix("no_")
        if name == "config":
            flags[name] = _single_path(tokens)
        elif name not in annotations and bool in _alternatives(annotations.get(positive)):
            if tokens:
                raise ConfigError(f"--{name}: expected no value, found '{' '.join(tokens)}'.")
            flags[positive] = Written("false", f"--{name}")
        else:
            flags[name] = _flag_value(name, tokens, annotations)
    return flags


def _present_flag(written: str, others: Collection[str], renamed: Mapping[str, str]) -> str:
    """The flag's present name; `no_` before a boolean's name stays."""
    former = written if written in renamed else written.removeprefix("no_")
    if former not in renamed:
        return written
    present = renamed[former]
    for other in (present, f"no_{present}"):
        if other in others:
            raise ConfigError(
                f"--{written}: the former name of --{present}, which is also given as --{other}; "
                "keep one of the two."
            )
    notify_of_rename(f"--{former}", f"--{present}")
    return written.replace(former, present)


# Flags of one program that others refuse, and why.
ELSEWHERE = {
    "acceptance": " It is one of `posttrain generate`: typical acceptance changes the distribution "
    "of completions, so what learns from them, or is measured by them, accepts exactly."
}


@cache
def notify_of_rename(former: str, present: str) -> None:
    """Print a setting's new name on stderr, once per process and from the main process only."""
    if os.environ.get("RANK", "0") == "0":  # once, not on every rank
        print(f"{former} is now {present}", file=sys.stderr, flush=True)


def _single_path(tokens: list[str]) -> Path:
    found = " ".join(tokens) or "nothing"
    path = Path(shipped_path(found))
    if len(tokens) == 1 and path.is_file():
        return path
    neighbours = [str(p) for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml")]
    raise ConfigError(
        f"--config: expected one YAML file, found '{found}'.{did_you_mean(found, neighbours)}"
    )


def _flag_value(name: str, tokens: list[str], annotations: Mapping[str, object]) -> Written:
    if name not in annotations:
        near = did_you_mean(f"--{name}", [f"--{known}" for known in annotations])
        why = ELSEWHERE.get(name) or near or " --help lists the flags."
        raise ConfigError(f"--{name}: unknown flag.{why}")
    if typing.get_origin(annotations[name]) is dict:
        raise ConfigError(f"--{name}: not a flag; write '{name}:' in a YAML file for --config.")
    alternatives = _alternatives(annotations[name])
    if not tokens and bool in alternatives:
        tokens = ["true"]
    takes_list = any(typing.get_origin(a) is list for a in alternatives)
    return Written(tokens[0] if len(tokens) == 1 and not takes_list else tokens, f"--{name}")


def read_yaml(
    path: Path, annotations: Mapping[str, object], renamed: Mapping[str, str]
) -> dict[str, Written]:
    """Read a flat YAML mapping into {name: Written}; keys of an inner mapping as `name.key` too.

    `annotations` and `renamed` are those of `read_flags`. Plain values keep their own text (`2e-5`,
    which YAML 1.1 takes for a string, or `1.10`), so that the field's type decides what they are.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe YAML that reads `2e-5` as a number, for values without a declared type."""

    scientific = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", scientific, list("-+0123456789"))
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}, line 1: expected 'setting: value' lines.")
        return _read_mapping(loader, root, path, annotations, renamed)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.problem}.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected YAML in UTF-8: {error}.") from None


def _read_mapping(
    loader: yaml.SafeLoader,
    root: yaml.MappingNode,
    path: Path,
    annotations: Mapping[str, object],
    renamed: Mapping[str, str],
) -> dict[str, Written]:
    written: dict[str, Written] = {}
    for key_node, node in root.value:
        key = str(loader.construct_object(key_node))
        place = f"{path}, line {key_node.start_mark.line + 1}"
        if key in renamed:
            notify_of_rename(f"{place}: '{key}'", f"'{renamed[key]}'")
            key = renamed[key]
        if key not in annotations:
            near = did_you_mean(key, annotations) or " --help lists the settings."
            raise ConfigError(f"{place}: unknown key '{key}'.{near}")
        if key in written:
            raise ConfigError(f"{place}: '{key}' is set a second time; keep one of the two.")
        written[key] = Written(_node_value(loader, node), f"{place}, {key}")
        if node.id == "mapping":
            for inner, _ in node.value:
                name = f"{key}.{inner.value}"
                written[name] = Written(None, f"{path}, line {inner.start_mark.line + 1}, {name}")
    return written


def _node_value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if node.id == "mapping":
        return loader.construct_object(node, deep=True)
    if node.id == "sequence":
        return [_scalar_text(item) for item in node.value]
    return _scalar_text(node)


def _scalar_text(node: yaml.Node) -> str | None:
    """The text as written; None for YAML's null and for what is nested one level too deep."""
    if node.id != "scalar" or node.tag == "tag:yaml.org,2002:null":
        return None
    if node.tag == "tag:yaml.org,2002:float":
        return node.value.replace(".inf", "inf").replace(".nan", "nan")
    return node.value


def convert(
    annotation: object, value: str | list[str] | dict[str, object] | None, where: str
) -> Any:
    """Convert what was written to its field's type; raise ConfigError if it does not fit."""
    from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo

    if typing.get_origin(annotation) is dict:
        if not isinstance(value, dict):
            _reject(annotation, value, where)
        return value
    alternatives = _alternatives(annotation)
    if value is None and NoneType in alternatives:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(annotation, set()))
    if value is None or isinstance(value, dict) or (isinstance(value, list) and spec.nargs == 1):
        _reject(annotation, value, where)
    tokens = value if isinstance(value, list) else [value]
    if None in tokens:
        _reject(annotation, value, where)
    if bool in alternatives:
        tokens = [BOOLEANS.get(token.lower(), token) for token in tokens]
        if tokens[0] not in (*BOOLEANS.values(), "None"):  # tyro takes any other text for False
            _reject(annotation, value, where)
    try:
        return spec.instance_from_str(tokens)
    except ValueError:
        _reject(annotation, value, where)


def _reject(annotation: object, value: object, where: str) -> NoReturn:
    near = ""
    if isinstance(value, str):
        found = f"'{value}'"
        near = did_you_mean(value, _choices(annotation))
    elif isinstance(value, dict):
        found = "a mapping"
    else:
        found = f"[{', '.join(map(str, value))}]" if value else "nothing"
    stop = ";" if _choices(annotation) else ","
    raise ConfigError(f"{where}: expected {expected(annotation)}{stop} found {found}.{near}")


def _alternatives(annotation: object) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _choices(annotation: object) -> list[str]:
    literals = [a for a in _alternatives(annotation) if typing.get_origin(a) is Literal]
    return [str(choice) for literal in literals for choice in typing.get_args(literal)]


def expected(annotation: object) -> str:
    """Describe a type for an error message: `a number or none`, `one of dpo, ipo`, …"""
    words = []
    for alternative in _alternatives(annotation):
        origin, arguments = typing.get_origin(alternative), typing.get_args(alternative)
        if origin is Literal:
            words.append(f"one of {', '.join(map(str, arguments))}")
        elif origin is list:
            words.append(f"a list ({expected(arguments[0])} each)")
        elif origin is dict:
            words.append("'key: value' lines")
        else:
            words.append(TYPE_NAMES[alternative])
    return " or ".join(words)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ` Did you mean 'learning_rate'?`, or nothing if no valid name is near."""
    nearest = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
