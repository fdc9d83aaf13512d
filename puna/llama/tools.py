"""Calls of tools as text: how Llama 3 writes them, and what an answer is read as.

    json          {"type": "function", "name": NAME, "parameters": {...}}     Llama 3.1
    function_tag  <function=NAME>{...}</function>                             Llama 3.1
    python_list   [name(parameter=value), ...]                                Llama 3.2
    built in      NAME.call(query="..."), or bare Python for the code interpreter

Reading follows the reference (llama-models: chat_format.py, tool_utils.py); docs/dialog.md lists where it differs.
"""

import ast
import json
import keyword
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Dialect = Literal["json", "function_tag", "python_list"]
DIALECTS: tuple[str, ...] = get_args(Dialect)
Form = Literal["json", "function_tag", "python_list", "builtin"]

CODE = "code_interpreter"
BUILTINS = ("brave_search", "wolfram_alpha", "photogen", CODE)

_TAG = re.compile(r"<function=(?P<name>[^<>{}\s]+)>\s*(?=\{)")
_BUILTIN_CALL = re.compile(r'\b(?P<name>\w+)\.call\(query="(?P<query>[^"]*)"\)')
_PYTHON_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


@dataclass(frozen=True)
class ToolCall:
    """A call by the model. arguments: JSON values by parameter."""

    name: str
    arguments: Mapping[str, Any]


class Wire(NamedTuple):
    """Calls as they are sent: their text, whether <|python_tag|> goes before it, and <|eom_id|> after it."""

    text: str
    tagged: bool
    ends_message: bool


class Reading(NamedTuple):
    """What an answer was read as: its calls (none: plain text) and the form they were written in."""

    calls: tuple[ToolCall, ...]
    form: Form | None


# --- writing --------------------------------------------------------------------------------------------------------


def write(calls: Sequence[ToolCall], dialect: Dialect, *, ipython: bool, answered: bool) -> Wire:
    """Calls in the reference's spelling. Raises ValueError for what it cannot say.

    ipython: the system message turns the environment on. answered: a tool's answer follows; the documented transcripts
    then put the tag before a Python list.
    """
    _check_arguments(calls)
    if len(calls) == 1 and (text := _builtin(calls[0])) is not None:
        return Wire(text, True, True)
    if dialect == "python_list":
        return Wire(f"[{', '.join(map(_python_call, calls))}]", answered, False)
    call = _only(calls)
    if dialect == "function_tag":
        return Wire(_function_tag(call), False, False)
    spelled = {"type": "function", "name": call.name, "parameters": dict(call.arguments)}
    return Wire(json.dumps(spelled), ipython, ends_message("json", ipython))


def write_hugging_face(calls: Sequence[ToolCall], builtins: Sequence[str]) -> Wire:
    """A call in the spelling of Hugging Face's template, where `builtins` are enabled. Raises ValueError."""
    _check_arguments(calls)
    call = _only(calls)
    if call.name not in builtins:
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        return Wire(f'{{"name": "{call.name}", "parameters": {arguments}}}', False, bool(builtins))
    if not all(isinstance(value, str) for value in call.arguments.values()):
        raise ValueError(f"the arguments of {call.name} must be text")
    pairs = ", ".join(f'{name}="{value}"' for name, value in call.arguments.items())
    return Wire(f"{call.name}.call({pairs})", True, True)


def ends_message(form: Form | None, ipython: bool) -> bool:
    """Whether the reference ends calls of this form with <|eom_id|>: the turn goes on with the tool's answer."""
    return form == "builtin" or (form == "json" and ipython)


def _check_arguments(calls: Sequence[ToolCall]) -> None:
    for call in calls:
        if not call.name:
            raise ValueError("a call has no name")
        if not is_json(dict(call.arguments)):
            raise ValueError(f"the arguments of {call.name} are not JSON values")


def _only(calls: Sequence[ToolCall]) -> ToolCall:
    if len(calls) > 1:
        raise ValueError(f"it holds {len(calls)} calls, and only the dialect python_list has more than one a message")
    return calls[0]


def _builtin(call: ToolCall) -> str | None:
    """The text of a built-in's call; None for other tools, and where that text would be read as another call."""
    if call.name not in BUILTINS:
        return None
    key = "code" if call.name == CODE else "query"
    if call.arguments.keys() != {key} or not isinstance(call.arguments[key], str):
        raise ValueError(f"{call.name} takes one argument, {key}, a text")
    value = call.arguments[key]
    text = value if key == "code" else f'{call.name}.call(query="{value}")'
    return text if read(text, tagged=True).calls == (call,) else None


def _function_tag(call: ToolCall) -> str:
    if not re.fullmatch(r"[^<>{}\s]+", call.name):
        raise ValueError(f"the name {call.name!r} cannot stand in <function=...>")
    return f"<function={call.name}>{json.dumps(dict(call.arguments))}</function>"


def _python_call(call: ToolCall) -> str:
    for name in (call.name, *call.arguments):
        if not _PYTHON_NAME.fullmatch(name) or keyword.iskeyword(name):
            raise ValueError(f"{name!r} is no Python name, so the dialect python_list cannot say it")
    return f"{call.name}({', '.join(f'{name}={_literal(value)}' for name, value in call.arguments.items())})"


def _literal(value: Any) -> str:
    """A JSON value as a Python literal, strings in double quotes as the reference writes them."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    return repr(value)


def is_json(value: Any) -> bool:
    """Whether JSON has this value; it has no infinities, no NaN and only text as keys."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(is_json, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


# --- reading --------------------------------------------------------------------------------------------------------


def read(body: str, tagged: bool) -> Reading:
    """The calls in the body of an answer; tagged: <|python_tag|> stood before it."""
    text = body.strip()
    for form, calls in (
        ("json", _read_json(text)),
        ("python_list", _read_python(text)),
        ("function_tag", _read_function_tag(text)),
    ):
        if any(call.name in BUILTINS and not call.arguments for call in calls):
            break
        if calls:
            return Reading(tuple(map(_reduced, calls)), form)  # type: ignore[arg-type]
    if found := _BUILTIN_CALL.search(body):
        return Reading((ToolCall(found["name"], {"query": found["query"]}),), "builtin")
    return Reading((ToolCall(CODE, {"code": body}),), "builtin") if tagged else Reading((), None)


def _reduced(call: ToolCall) -> ToolCall:
    """A built-in's call in the spelling of a function: its first argument, under the name it has there."""
    if call.name not in BUILTINS:
        return call
    return ToolCall(call.name, {"code" if call.name == CODE else "query": str(next(iter(call.arguments.values())))})


def _read_json(text: str) -> list[ToolCall]:
    try:
        value = json.loads(text)
    except _UNREADABLE:
        return []
    match value:
        case {"name": str(name), "parameters": dict(arguments)} if name and is_json(arguments):
            return [ToolCall(name, arguments)]
    return []


def _read_python(text: str) -> list[ToolCall]:
    """The calls of a Python list of calls with keyword arguments that are JSON literals; none where any is not."""
    if not text.startswith("["):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(text, mode="eval").body
            return [_call_of(node) for node in tree.elts] if isinstance(tree, ast.List) else []
    except _UNREADABLE:
        return []


def _call_of(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("not a call by name with keyword arguments")
    arguments = {str(pair.arg): ast.literal_eval(pair.value) for pair in node.keywords if pair.arg}
    if len(arguments) != len(node.keywords) or not is_json(arguments):
        raise ValueError("a keyword twice, or a value that JSON does not have")
    return ToolCall(node.func.id, arguments)


def _read_function_tag(text: str) -> list[ToolCall]:
    found = _TAG.search(text)
    if not found:
        return []
    rest = text[found.end() :]
    for spelling in (rest, rest.replace("'", '"')):
        try:
            arguments, _ = json.JSONDecoder().raw_decode(spelling)
        except _UNREADABLE:
            continue
        return [ToolCall(found["name"], arguments)] if is_json(arguments) else []
    return []


# --- what the model is told -----------------------------------------------------------------------------------------

INTRODUCTION = "The following functions can be called. Each is described in JSON."
HOW_TO_CALL: dict[str, str] = {
    "json": 'To call one, answer only with JSON: {"type": "function", "name": NAME, "parameters": {PARAMETER: VALUE}}',
    "hugging_face": 'To call one, answer only with JSON: {"name": NAME, "parameters": {PARAMETER: VALUE}}',
    "function_tag": 'To call one, answer only with one line: <function=NAME>{"PARAMETER": VALUE}</function>',
    "python_list": "To call some, answer only with a Python list of calls: [name(parameter=value), ...]",
}


def describe(tools: Sequence[Mapping[str, Any]], spelling: str) -> str:
    """What a model is told of functions. tools: OpenAI's {"type": "function", "function": {name, ...}} or bare ones."""
    shown = [json.dumps(tool, indent=4, ensure_ascii=False) for tool in tools]
    return "\n\n".join([INTRODUCTION, *shown, HOW_TO_CALL[spelling]])
