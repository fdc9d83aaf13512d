"""Tools in chats: what is written in each dialect, id by id, and what an answer is read as."""

import re
import sys
from pathlib import Path

import pytest

from puna.errors import DataError
from puna.llama.dialog import Message, Style, parse, parse_answer, parse_answer_text, render
from puna.llama.tokenizer import Tokenizer
from puna.llama.tools import ToolCall, read

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a transcript that shows control tokens by name."""
    parts = re.split(r"(<\|\w+\|>)", text)
    return [
        i
        for part in parts
        for i in ([tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part))
    ]


def called(name: str, **arguments: object) -> Message:
    return Message("assistant", tool_calls=(ToolCall(name, arguments),))


TRANSCRIPT = """<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Environment: ipython
Tools: brave_search, wolfram_alpha
Cutting Knowledge Date: December 2023
Today Date: 05 January 2025

You answer in one sentence.<|eot_id|><|start_header_id|>user<|end_header_id|>

How many days are in 7 leap years?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

<|python_tag|>wolfram_alpha.call(query="7 * 366")<|eom_id|><|start_header_id|>ipython<|end_header_id|>

{"result": "2562"}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Seven leap years contain 2,562 days.<|eot_id|><|start_header_id|>user<|end_header_id|>

Thanks.<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""


def test_the_documented_transcript(llama3):
    """A built-in tool from question to answer, as the model's own documentation writes it."""
    messages = [
        Message("system", "You answer in one sentence."),
        Message("user", "How many days are in 7 leap years?"),
        called("wolfram_alpha", query="7 * 366"),
        Message("tool", '{"result": "2562"}'),
        Message("assistant", "Seven leap years contain 2,562 days."),
        Message("user", "Thanks."),
    ]
    style = Style(builtins=("brave_search", "wolfram_alpha"), date="05 January 2025")
    assert render(llama3, messages, style).ids == ids_of(llama3, TRANSCRIPT)
    head = "Environment: ipython\nTools: brave_search, wolfram_alpha\nCutting Knowledge Date: December 2023\n"
    system = Message("system", f"{head}Today Date: 05 January 2025\n\nYou answer in one sentence.")
    assert parse(llama3, render(llama3, messages, style).ids) == [system, *messages[1:]]


HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
IPYTHON = Message("system", "Environment: ipython")
ASKED = Message("user", "u")
ANSWERED = Message("tool", "t")


@pytest.mark.parametrize(
    ("before", "call", "dialect", "after", "written"),
    [
        (
            [], called("f", a="é", b=[1, None]), "json", [],
            r'{"type": "function", "name": "f", "parameters": {"a": "\u00e9", "b": [1, null]}}<|eot_id|>',
        ),
        (
            [IPYTHON], called("f"), "json", [],
            '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}<|eom_id|>',
        ),
        ([], called("get_it", a="x"), "function_tag", [], '<function=get_it>{"a": "x"}</function><|eot_id|>'),
        ([IPYTHON], called("f", a=1.5), "function_tag", [ANSWERED], '<function=f>{"a": 1.5}</function><|eot_id|>'),
        (
            [], called("f1", a="x", b=2, c=True, d={"e": [None]}), "python_list", [],
            '[f1(a="x", b=2, c=True, d={"e": [None]})]<|eot_id|>',
        ),
        ([], called("f", a='"q"\n'), "python_list", [ANSWERED], r'<|python_tag|>[f(a="\"q\"\n")]<|eot_id|>'),
        (
            [], called("brave_search", query="llama"), "python_list", [],
            '<|python_tag|>brave_search.call(query="llama")<|eom_id|>',
        ),
        ([], called("code_interpreter", code="print(1)\n"), "function_tag", [], "<|python_tag|>print(1)\n<|eom_id|>"),
        (
            [], called("brave_search", query='"q"'), "json", [],
            r'{"type": "function", "name": "brave_search", "parameters": {"query": "\"q\""}}<|eot_id|>',
        ),
    ],
)  # fmt: skip
def test_each_dialect(tiny, before, call, dialect, after, written):
    messages = [*before, ASKED, call, *after]
    whole = render(tiny, messages, Style(dialect), prompt=False).ids
    head = render(tiny, [*before, ASKED], Style(dialect), prompt=False).ids
    tail = render(tiny, after, prompt=False).ids[1:] if after else []
    assert whole == head + ids_of(tiny, HEADER) + ids_of(tiny, written) + tail
    assert parse(tiny, whole) == messages
    body = ids_of(tiny, written)
    assert parse_answer(tiny, body).tool_calls == call.tool_calls
    assert parse_answer_text(written).tool_calls == call.tool_calls


def test_several_calls_in_one_message(tiny):
    both = Message("assistant", tool_calls=(ToolCall("f1", {"a": "x", "b": 2}), ToolCall("f2", {"c": True})))
    ids = render(tiny, [ASKED, both], Style("python_list"), prompt=False).ids
    assert ids[-len(tiny.encode('[f1(a="x", b=2), f2(c=True)]')) - 1 : -1] == tiny.encode(
        '[f1(a="x", b=2), f2(c=True)]'
    )
    assert parse(tiny, ids) == [ASKED, both]
    with pytest.raises(DataError, match="Message 1 of the assistant cannot be written: it holds 2 calls"):
        render(tiny, [ASKED, both])


@pytest.mark.parametrize(
    ("calls", "builtins", "written"),
    [
        (called("f", a="é"), (), '{"name": "f", "parameters": {"a": "é"}}<|eot_id|>'),
        (called("f"), ("brave_search",), '{"name": "f", "parameters": {}}<|eom_id|>'),
        (called("brave_search", query="q"), ("brave_search",), '<|python_tag|>brave_search.call(query="q")<|eom_id|>'),
        (called("brave_search", query="q"), (), '{"name": "brave_search", "parameters": {"query": "q"}}<|eot_id|>'),
    ],
)
def test_calls_in_hugging_faces_dialect(tiny, calls, builtins, written):
    ids = render(tiny, [ASKED, calls], Style(trim=True, builtins=builtins), prompt=False).ids
    expected = ids_of(tiny, HEADER + written)
    assert ids[-len(expected) :] == expected


@pytest.mark.parametrize("dialect", ["json", "function_tag", "python_list"])
def test_functions_are_described(tiny, dialect):
    """To the user for JSON, in the system message for the others, after what stands there."""
    first, second = parse(tiny, render(tiny, [Message("system", "s"), ASKED], Style(dialect, tools=(TOOL,))).ids)
    told, quiet = (second, first) if dialect == "json" else (first, second)
    assert '"name": "f"' in told.content
    assert '"name": "f"' not in quiet.content
    assert told.content.endswith("\n\nu" if dialect == "json" else "\n\ns")
    assert first.content.startswith("Environment: ipython") == (dialect != "python_list")


def test_functions_need_a_user_for_json(tiny):
    with pytest.raises(DataError, match="There is no user message to describe the tools in"):
        render(tiny, [Message("system", "s")], Style(tools=(TOOL,)))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Message("user", "u", (ToolCall("f", {}),)), "Message 0 of the user calls a tool. Only the assistant can"),
        (Message("assistant", "x", (ToolCall("f", {}),)), "Message 0 of the assistant has both content and tool calls"),
        (called("f", a=float("nan")), "the arguments of f are not JSON values"),
        (called("f", a={1: 2}), "the arguments of f are not JSON values"),
        (called(""), "a call has no name"),
        (called("brave_search", q="x"), "brave_search takes one argument, query, a text"),
        (called("code_interpreter", code=5), "code_interpreter takes one argument, code, a text"),
    ],
)
def test_what_cannot_be_written(tiny, message, words):
    with pytest.raises(DataError) as error:
        render(tiny, [message])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("call", "dialect", "words"),
    [
        (called("a-b"), "python_list", "'a-b' is no Python name"),
        (called("f", **{"class": 1}), "python_list", "'class' is no Python name"),
        (called("a>b"), "function_tag", "the name 'a>b' cannot stand in <function=...>"),
    ],
)
def test_names_that_a_dialect_cannot_say(tiny, call, dialect, words):
    with pytest.raises(DataError) as error:
        render(tiny, [ASKED, call], Style(dialect))
    assert words in str(error.value)


def test_a_tokenizer_without_the_tag(tiny, tmp_path):
    old = tiny_tokenizer(tmp_path)
    del old.special["<|python_tag|>"], old.special["<|eom_id|>"]
    with pytest.raises(DataError, match=r"The tokenizer has no control token <\|python_tag\|>"):
        render(old, [called("brave_search", query="x")])
    assert parse(old, render(old, [ASKED]).ids) == [ASKED]


ACCEPTED = [
    ('{"type": "function", "name": "f", "parameters": {"a": 1}}', "f", {"a": 1}),
    ('\n{\n  "name": "f",\n  "parameters": {}\n}\n', "f", {}),
    ('<function=getWeather>{"place":"New York","date":"5"}', "getWeather", {"place": "New York", "date": "5"}),
    ('Sure. <function=f>{"a": {"b": "it\'s"}}</function>', "f", {"a": {"b": "it's"}}),
    ("<function=f>{'a': 'b'}</function>", "f", {"a": "b"}),
    ('[boil(liquid="water", celsius=True, raw=False)]', "boil", {"liquid": "water", "celsius": True, "raw": False}),
    ("[volume(radius=5.2, height=10, below=-3)]", "volume", {"radius": 5.2, "height": 10, "below": -3}),
    ('[f(liquid={"name": "water"}, value=[100, 101])]', "f", {"liquid": {"name": "water"}, "value": [100, 101]}),
    ("[start()]", "start", {}),
    ('brave_search.call(query="who?")', "brave_search", {"query": "who?"}),
    ('I would ask wolfram_alpha.call(query="7 * 366")', "wolfram_alpha", {"query": "7 * 366"}),
    ('{"name": "brave_search", "parameters": {"q": "x", "n": 3}}', "brave_search", {"query": "x"}),
    ('[wolfram_alpha(text="x")]', "wolfram_alpha", {"query": "x"}),
    ('{"name": "code_interpreter", "parameters": {"source": "1"}}', "code_interpreter", {"code": "1"}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "name", "arguments"), ACCEPTED, ids=[body for body, *_ in ACCEPTED])
def test_read_as_a_call(tiny, body, name, arguments):
    assert read(body, tagged=False).calls == (ToolCall(name, arguments),)
    assert parse_answer(tiny, tiny.encode(body)).content == ""


REJECTED = [
    "", "[]", "[f(1, 2)]", "[f(a=1), 42]", "[[f(a=1)]]", "[(f(a=1),)]", "f(a=1)", "[f(a=1", "[f(a=1)", '{"f": g(a=1)}',
    "[a.f(b=1)]", "[f(**x)]", "[f(a=g())]", "[f(a={1})]", "[f(a=b'x')]", "[f(a=(1, 2))]", "[f(a=1, a=2)]",
    "[f(a=1e999)]",
    '{"name": "f"}', '{"name": 5, "parameters": {}}', '{"type": "function"}', '{"name": "f", "parameters": []}', "5",
    '{"name": "f", "parameters": {"a": NaN}}', "<function=f>", "<function=f>{a}</function>", "<function=f>[1]",
    "brave_search.call(query='x')", "brave_search.call('x')", '{"name": "brave_search", "parameters": {}}',
    "[" * 5000, "[f(a=" + "-" * 5000 + "1)]", '{"a":' * 5000, r"[f(a='\d')", "[f(a=1)] and more",
]  # fmt: skip


@pytest.mark.parametrize("body", REJECTED, ids=[body[:30] for body in REJECTED])
def test_read_as_text(tiny, body):
    assert read(body, tagged=False) == ((), None)
    assert parse_answer(tiny, tiny.encode(body)) == Message("assistant", body)


def test_behind_the_tag_all_else_is_code(tiny):
    assert read(" x = 1\n", tagged=True).calls == (ToolCall("code_interpreter", {"code": " x = 1\n"}),)
    assert parse_answer_text("<|python_tag|>x<|eom_id|>").tool_calls == (ToolCall("code_interpreter", {"code": "x"}),)
