"""Every fault is answered in OpenAI's shape, with words that name the field and the fix."""

import openai
import pytest
import torch

from puna.engine.generator import Generator
from puna.llama.model import Llama

USER = [{"role": "user", "content": "x"}]
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def called(arguments: str) -> dict:
    """An assistant's message that calls a function."""
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}


def fault(response, status) -> dict:
    """The error of an answer, its shape checked."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


@pytest.mark.parametrize(
    ("path", "fields", "param", "code", "words"),
    [
        (TEXT, {"temprature": 1}, "temprature", "unknown_parameter", "temprature; did you mean temperature?"),
        (TEXT, {"qqq": 1}, "qqq", "unknown_parameter", "Unknown field qqq; known fields: model, temperature, top_p"),
        (TEXT, {"top_k": 5}, "top_k", "unknown_parameter", "Unknown field top_k; did you mean top_p?"),
        (TEXT, {"best_of": 2}, "best_of", "unsupported_parameter", "best_of is not supported by this server"),
        (TEXT, {"suffix": "x"}, "suffix", "unsupported_parameter", "suffix is not supported"),
        (TEXT, {"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter", "logit_bias is not supported"),
        (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter", "is not supported"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions", "unsupported_parameter", "functions is not supported"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter", "is missing"),
        (CHAT, {"tools": [{"type": "code"}]}, "tools[0].type", "invalid_value", 'is "code"; it must be "function"'),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "invalid_value", 'it must be "none" or "auto"'),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "leave it"),
        (TEXT, {"temperature": "hot"}, "temperature", "invalid_value", 'temperature is "hot"; it must be a'),
        (TEXT, {"temperature": 2.5}, "temperature", "invalid_value", "temperature is 2.5; it must be a number from 0"),
        (TEXT, {"top_p": -0.1}, "top_p", "invalid_value", "top_p is -0.1; it must be a number from 0 to 1"),
        (TEXT, {"n": 0}, "n", "invalid_value", "n is 0; it must be an integer from 1 to 128"),
        (TEXT, {"n": True}, "n", "invalid_value", "n is true; it must be an integer"),
        (TEXT, {"max_tokens": 0}, "max_tokens", "invalid_value", "it must be an integer of at least 1"),
        (TEXT, {"max_tokens": 1.5}, "max_tokens", "invalid_value", "max_tokens is 1.5; it must be an integer"),
        (TEXT, {"seed": "x"}, "seed", "invalid_value", 'seed is "x"; it must be an integer'),
        (TEXT, {"stop": ""}, "stop", "invalid_value", 'stop is ""; it must be a string of at least one character'),
        (TEXT, {"stop": ["a"] * 17}, "stop", "invalid_value", "or a list of at most 16 of them"),
        (TEXT, {"stream": 1}, "stream", "invalid_value", "stream is 1; it must be true or false"),
        (TEXT, {"logprobs": 6}, "logprobs", "invalid_value", "logprobs is 6; it must be an integer from 0 to 5"),
        (TEXT, {"prompt": 5}, "prompt", "invalid_value", "it must be a string, a list of strings, a"),
        (TEXT, {"prompt": []}, "prompt", "invalid_value", "prompt is an empty list; give at least one prompt"),
        (TEXT, {"prompt": [[]]}, "prompt", "invalid_value", "prompt is [[]]; it must be"),
        (TEXT, {"prompt": [1, "x"]}, "prompt", "invalid_value", 'prompt is [1, "x"]; it must be'),
        (TEXT, {"prompt": [1, 5000]}, "prompt", "invalid_value", "Use ids from 0 to 339."),
        (TEXT, {"prompt": None}, "prompt", "missing_required_parameter", "prompt is missing; it must be a string"),
        (TEXT, {"model": None}, "model", "missing_required_parameter", "it must be the name of the model, as"),
        (TEXT, {"echo": True, "logprobs": 1}, "echo", "unsupported_parameter", "echo together with logprobs is not"),
        (TEXT, {"stream_options": {}}, "stream_options", "invalid_value", "given but stream is not true"),
        (
            TEXT, {"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use",
            "unknown_parameter", "Unknown field stream_options.include_use; did you mean include_usage?",
        ),
        (TEXT, {"max_tokens": 96}, "prompt", "context_length_exceeded", "96 more were asked for, but this"),
        (CHAT, {"max_tokens": 96}, "messages", "context_length_exceeded", "Shorten the prompt or ask for fewer"),
        (CHAT, {"messages": []}, "messages", "invalid_value", "must be a list of at least one message"),
        (CHAT, {"messages": ["x"]}, "messages", "invalid_value", 'messages is ["x"]; it must be a list'),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "is missing"),
        (
            CHAT, {"messages": [*USER, {"role": "boss", "content": "x"}]}, "messages[1].role", "invalid_value",
            'messages[1].role is "boss"; it must be "system", "developer", "user", "assistant" or "tool"',
        ),
        (
            CHAT, {"messages": [*USER, called("[]")]}, "messages[1].tool_calls[0].function.arguments", "invalid_value",
            "arguments is not a string that holds a JSON object",
        ),
        (
            CHAT, {"messages": [*USER, called("{}") | {"content": "x"}]}, "messages", "invalid_value",
            "Message 1 of the assistant has both content and tool calls",
        ),
        (
            CHAT, {"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages[0].nam", "unknown_parameter",
            "Unknown field messages[0].nam",
        ),
        (
            CHAT, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name",
            "unsupported_parameter", "messages[0].name is not supported by this server; leave it out",
        ),
        (
            CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages[0].content[0].type", "invalid_value", 'is "image_url"; it must be "text", the only kind',
        ),
        (
            CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content", "invalid_value",
            "it must be a string, or a list of text parts",
        ),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "invalid_value", "not both"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs", "invalid_value", "top_logprobs is given but logprobs is not true"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "an integer from 0 to 20"),
    ],
)  # fmt: skip
def test_a_bad_field(http, path, fields, param, code, words):
    good = {"model": "tiny", **({"prompt": "x"} if path == TEXT else {"messages": USER, "max_tokens": 4})}
    if "max_completion_tokens" in fields:
        good.pop("max_tokens")
    error = fault(http.post(path, json=good | fields), 400)
    assert words in error["message"]
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "service_tier": "auto"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "store": False, "seed": None, "stop": None},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "reasoning_effort": None},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(http, fields):
    ask = {"model": "tiny", "messages": USER, "max_tokens": 2, **fields}
    assert http.post(CHAT, json=ask).status_code == 200


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="The model 'other' is not here; this server has 'tiny'") as caught:
        client.completions.create(model="other", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="top_k") as caught:
        client.completions.create(model="tiny", prompt="x", extra_body={"top_k": 5})
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", "top_k")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, max_tokens=500, stream=True)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "The body is not JSON: "),
        (b"\xff", "The body is not JSON: "),
        (b"[" * 100_000, "The body is not JSON: "),
        (b"[]", "The body must be a JSON object"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature is NaN; it must be a number"),
    ],
)
def test_a_body_that_is_not_a_request(http, body, words):
    response = http.post(TEXT, content=body, headers={"Content-Type": "application/json"})
    assert words in fault(response, 400)["message"]


def test_a_body_that_is_not_declared_as_json(http):
    response = http.post(TEXT, content=b'{"model": "tiny", "prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in fault(response, 415)["message"]


def test_a_body_that_is_too_large(http):
    error = fault(http.post(TEXT, json={"model": "tiny", "prompt": "x" * (17 << 20)}), 413)
    assert error["message"] == "The body is larger than 16 MiB"


def test_text_that_is_no_unicode_is_answered(http):
    body = b'{"model": "tiny", "prompt": "a\\ud800b", "echo": true, "max_tokens": 2}'
    response = http.post(TEXT, content=body, headers={"Content-Type": "application/json"})
    assert response.json()["choices"][0]["text"].startswith("a\ud800b")


def test_wrong_paths_and_methods(http):
    assert fault(http.get("/v1/nothing"), 404)["message"] == "Not Found: GET /v1/nothing"
    assert fault(http.get(TEXT), 405)["message"] == "Method Not Allowed: GET /v1/completions"
    assert http.options(TEXT, headers={"Origin": "http://evil.example"}).status_code == 405
    assert (
        "access-control-allow-origin" not in http.get("/v1/models", headers={"Origin": "http://evil.example"}).headers
    )


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_a_page_that_makes_its_name_point_here_is_refused(http, host):
    error = fault(http.get("/v1/models", headers={"Host": host}), 403)
    assert error["code"] == "wrong_host"
    assert "only to 127.0.0.1, [::1], localhost" in error["message"]


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1", "[::1]:80", "LOCALHOST:9"])
def test_names_of_this_machine_are_answered(http, host):
    assert http.get("/health", headers={"Host": host}).json() == {"status": "ok"}


def test_a_failure_of_the_server(serve, generator, caplog):
    damaged = Llama(generator.model.config)
    with torch.no_grad():
        damaged.model.norm.weight.fill_(float("nan"))
    with serve(Generator(damaged, generator.tokenizer)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="The server failed: NonFinite; its log says more"):
            client.completions.create(model="tiny", prompt="x")
        with pytest.raises(openai.APIError, match="The server failed: NonFinite"):
            list(client.completions.create(model="tiny", prompt="x", stream=True))
        assert client.models.list().data[0].id == "tiny"
        client.close()
    assert "weights may be damaged" in caplog.text
