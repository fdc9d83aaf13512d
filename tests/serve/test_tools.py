"""Functions in chats over HTTP: what the model is told, how its calls come back, and how they are sent on."""

import json

import httpx
import pytest

from puna.engine.generator import Completion, Generator
from puna.engine.params import SamplingParams
from puna.engine.row import Row
from puna.llama.dialog import Message, Style, render
from puna.llama.model import Llama
from puna.llama.tools import ToolCall
from puna.serve.api.answers import ChatAnswers

TOOL = {"type": "function", "function": {"name": "graze", "description": "Eats.", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Who eats grass?"}
CALL = '{"type": "function", "name": "graze", "parameters": {"place": "plateau"}}'


@pytest.fixture(scope="module")
def long(generator):
    """A generator whose context holds the description of a function."""
    model = Llama(generator.model.config.model_copy(update={"max_seq_len": 1024}))
    model.load_state_dict(generator.model.state_dict())
    return Generator(model, generator.tokenizer)


@pytest.fixture(scope="module")
def long_http(long, serve):
    with serve(long) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def asked(http, **fields):
    ask = {"model": "tiny", "messages": [USER], "max_tokens": 2, "temperature": 0} | fields
    answer = http.post("/v1/chat/completions", json=ask)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_model_is_told_of_functions(long_http, generator):
    expected = render(generator.tokenizer, [Message("user", USER["content"])], Style(tools=(TOOL,))).ids
    assert asked(long_http, tools=[TOOL])["usage"]["prompt_tokens"] == len(expected)
    plain = asked(long_http)["usage"]["prompt_tokens"]
    assert asked(long_http, tools=[TOOL], tool_choice="none")["usage"]["prompt_tokens"] == plain < len(expected)


def test_calls_and_their_answers_are_sent_on(long_http, generator):
    call = {"id": "1", "type": "function", "function": {"name": "graze", "arguments": '{"place": "plateau"}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "1", "content": "green"})
    dialog = [
        Message("user", USER["content"]),
        Message("assistant", tool_calls=(ToolCall("graze", {"place": "plateau"}),)),
        Message("tool", "green"),
    ]
    expected = render(generator.tokenizer, dialog, Style(tools=(TOOL,))).ids
    assert asked(long_http, messages=messages, tools=[TOOL])["usage"]["prompt_tokens"] == len(expected)


def test_the_server_writes_in_its_style(long, serve):
    style = Style("python_list", trim=True)
    messages = [USER | {"content": " Who eats grass?\n"}]
    with serve(long, style) as url, httpx.Client(base_url=url, timeout=30) as client:
        expected = render(long.tokenizer, [Message("user", "Who eats grass?")], style).ids
        assert asked(client, messages=messages)["usage"]["prompt_tokens"] == len(expected)
    plain = render(long.tokenizer, [Message("user", "Who eats grass?")]).ids
    assert len(plain) < len(expected)


def drawn(tokenizer, ids):
    row = Row(0, 0, tokenizer.encode("x"), 500, SamplingParams(500), tokenizer)
    return [row.push(token, 0.0, []) for token in ids]


def answered(tokenizer, ids, **options):
    """The whole choice and the choices of a stream."""
    deltas, done = drawn(tokenizer, ids), Completion(0, 0)
    for delta in deltas:
        done.push(delta)
    stream = ChatAnswers(tokenizer, None, **options)
    return ChatAnswers(tokenizer, None, **options).whole(0, done), [c for d in deltas for c in stream.pieces(0, d)]


@pytest.mark.parametrize(
    "written", [CALL, '<function=graze>{"place": "plateau"}</function>', '[graze(place="plateau")]']
)
@pytest.mark.parametrize("tagged", [True, False])
def test_a_call_comes_back(generator, written, tagged):
    special = generator.tokenizer.special
    tag = [special["<|python_tag|>"]] * tagged
    ids = [*tag, *generator.tokenizer.encode(written), special["<|eom_id|>" if tagged else "<|eot_id|>"]]
    whole, stream = answered(generator.tokenizer, ids, reads_calls=True)
    (call,) = whole["message"]["tool_calls"]
    assert (whole["message"]["content"], whole["finish_reason"]) == (None, "tool_calls")
    assert (call["type"], call["function"]["name"]) == ("function", "graze")
    assert json.loads(call["function"]["arguments"]) == {"place": "plateau"}
    first, last = stream
    (piece,) = first["delta"]["tool_calls"]
    assert (piece["index"], piece["function"]) == (0, call["function"])
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


def test_text_is_text(generator):
    ids = [*generator.tokenizer.encode("the llama"), generator.tokenizer.special["<|eot_id|>"]]
    whole, stream = answered(generator.tokenizer, ids, reads_calls=True)
    assert (whole["message"]["content"], whole["finish_reason"]) == ("the llama", "stop")
    assert [choice["delta"] for choice in stream] == [{"content": "the llama"}, {}]


def test_a_call_that_was_cut_or_not_asked_for_is_text(generator):
    tokenizer = generator.tokenizer
    whole, _ = answered(tokenizer, [*tokenizer.encode(CALL), tokenizer.special["<|eot_id|>"]])
    assert whole["message"]["content"] == CALL
    row = Row(0, 0, tokenizer.encode("x"), len(tokenizer.encode(CALL)), SamplingParams(500), tokenizer)
    done = Completion(0, 0)
    for token in tokenizer.encode(CALL):
        done.push(row.push(token, 0.0, []))
    choice = ChatAnswers(tokenizer, None, reads_calls=True).whole(0, done)
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "length")
