"""Tools in conversations: the column `tools`, and the calls within assistant turns.

    example = with_tools(row, example)                     # columns tools, chat_template_kwargs
    calls = read_calls(row, "messages[1].tool_calls", value)

Files write tools as lists or as JSON text, and calls in OpenAI's layout or flat; all are read into
one form. The `with_other_…` functions rename tools and calls, by which chat.py sees whether a
template renders them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from posttrain.data.example import Example, Message
from posttrain.data.read import Row, suffix_of
from posttrain.errors import DataError

OPTIONS = "chat_template_kwargs"
TAKEN_OPTIONS = {"add_generation_prompt", "chat_template", "conversation", "tokenize", "tools"}
ARGUMENTS = ("arguments", "parameters")

Json = TypeVar("Json")  # a value as it was read from a file


TOOL_COLUMNS = ("tools", "chat_template_kwargs")


def with_tools(row: Row, example: Example) -> Example:
    """The example with the row's columns `tools` and `chat_template_kwargs`.

    Raises DataError for tools or options of a wrong type. Beside a row of texts, a column `tools`
    that holds no schemas is taken for something else and left alone.
    """
    is_other = example.texts is not None and not _are_schemas(row.values.get("tools"))
    tools = read_tools(row) if example.turns and not is_other else None
    options = _read_options(row)
    if tools is None and options is None:  # nearly always
        return example
    return replace(example, tools=tools, template_options=options)


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """The tools a row offers: a list of JSON schemas, or the JSON text of one; None for none."""
    tools = row.values.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(row, "tools", tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise row.wrong_type("tools", tools, "a list of JSON schemas, or its JSON text")
    return [_as_given(row, tool) for tool in tools]


def read_calls(row: Row, place: str, calls: object) -> list[dict[str, Any]]:
    """An assistant turn's calls, each as {type, function: {name, arguments}}, arguments an object.

    Calls without the `function` level and arguments as JSON text, as OpenAI writes them, are read.
    """
    if isinstance(calls, str):
        calls = _from_json(row, place, calls)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise row.wrong_type(place, calls, "a list of tool calls")
    return [_call(row, f"{place}[{number}]", call) for number, call in enumerate(calls)]


def call_names(turn: Message) -> list[str]:
    """Names of the functions that a turn calls."""
    return [call["function"]["name"] for call in turn.get("tool_calls") or ()]


def with_other_calls(turns: Sequence[Message]) -> list[Message]:
    """The turns with the function of every call renamed."""
    return [
        {**turn, "tool_calls": [_renamed(call) for call in turn["tool_calls"]]}
        if call_names(turn)
        else turn
        for turn in turns
    ]


def with_other_tools(example: Example) -> Example:
    """The example with its tools renamed; without them where they have no names."""
    named = len(tool_names(example.tools)) == len(example.tools)
    return replace(example, tools=[_renamed(tool) for tool in example.tools] if named else None)


def tool_names(tools: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the tools that have one, in `function` or beside it."""
    named = [tool.get("function") or tool for tool in tools]
    return [t["name"] for t in named if isinstance(t, dict) and isinstance(t.get("name"), str)]


def _are_schemas(tools: object) -> bool:
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    return is_list and len(tool_names(tools)) == len(tools)


def _read_options(row: Row) -> dict[str, Any] | None:
    options = row.values.get(OPTIONS)
    if options is None:
        return None
    if not isinstance(options, dict):
        raise row.wrong_type(OPTIONS, options, "an object")
    taken = TAKEN_OPTIONS & set(options)
    if taken:
        raise DataError(f"{row.where}: '{OPTIONS}' may not set {', '.join(sorted(taken))}.")
    return _as_given(row, options)


def _as_given(row: Row, value: Json) -> Json:
    """The value as it was written: Arrow gives each object the keys of all others, set to null."""
    return value if suffix_of(Path(row.file)).startswith(".json") else _without_nulls(value)


def _without_nulls(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _renamed(named: dict[str, Any]) -> dict[str, Any]:
    """The tool or call under another name, which stands in `function` or beside it."""
    if named.get("function"):
        return {**named, "function": _renamed(named["function"])}
    return {**named, "name": named["name"] + "_"}


def _call(row: Row, place: str, call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise row.wrong_type(place, call, "a tool call with a function's name and arguments")
    arguments = next((function[key] for key in ARGUMENTS if function.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = _from_json(row, f"{place}.arguments", arguments or "{}")
    elif isinstance(arguments, dict):
        arguments = _as_given(row, arguments)
    if not isinstance(arguments, dict):
        raise row.wrong_type(f"{place}.arguments", arguments, "an object")
    others = {} if function is call else {k: v for k, v in call.items() if v is not None}
    called = {"name": function["name"], "arguments": arguments}
    return {"type": "function"} | others | {"function": called}


def _from_json(row: Row, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{row.where}: '{place}' is not valid JSON ({error}).") from None
