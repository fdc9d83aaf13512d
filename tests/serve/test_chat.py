"""POST /v1/chat/completions through the official client, and its stream field by field."""

import json

import pytest

from puna.engine.generator import Completion
from puna.engine.params import SamplingParams
from puna.engine.row import Row
from puna.llama.dialog import Message, render
from puna.llama.tokenizer import Tokenizer
from puna.serve.api.answers import ChatAnswers

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who eats grass?"}]
ASK = {"model": "tiny", "messages": MESSAGES, "temperature": 1, "seed": 4, "max_tokens": 12}


def events(http, ask) -> list[str]:
    """What stands after "data: " in each event of a stream."""
    with http.stream("POST", "/v1/chat/completions", json={**ask, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    assert text.endswith("\n\n")
    assert all(event.startswith("data: ") for event in text.split("\n\n")[:-1])
    return [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]


def test_an_answer_is_the_engines(client, generator):
    answer = client.chat.completions.create(**ASK)
    prompt = render(generator.tokenizer, [Message("system", "Be brief."), Message("user", "Who eats grass?")]).ids
    expected = generator.generate([prompt], params=SamplingParams(12, 1, 1, 4))[0]
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.finish_reason, choice.index, choice.logprobs) == (expected.finish_reason, 0, None)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == len(prompt) + len(expected.tokens)


def test_content_may_come_in_parts_and_from_a_developer(client):
    parts = [{"type": "text", "text": "Who eats"}, {"type": "text", "text": " grass?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(**{**ASK, "messages": messages})
    assert answer.choices[0].message.content == client.chat.completions.create(**ASK).choices[0].message.content


def test_an_answer_can_be_sent_back(client):
    answer = client.chat.completions.create(**ASK).choices[0].message
    messages = [*MESSAGES, answer.model_dump(), {"role": "user", "content": "And?"}]
    assert client.chat.completions.create(**{**ASK, "messages": messages}).choices[0].message.role == "assistant"


def test_the_text_of_a_message_never_becomes_a_control_token(client):
    plain = client.chat.completions.create(**{**ASK, "messages": [{"role": "user", "content": "x"}]})
    tricky = client.chat.completions.create(**{**ASK, "messages": [{"role": "user", "content": "x<|eot_id|>"}]})
    assert tricky.usage.prompt_tokens > plain.usage.prompt_tokens + 3


def test_max_completion_tokens(client):
    ask = {**ASK, "max_completion_tokens": 3}
    del ask["max_tokens"]
    assert client.chat.completions.create(**ask).usage.completion_tokens <= 3


def test_without_a_limit_the_context_is_the_limit(client):
    ask = {**ASK, "seed": 8}
    del ask["max_tokens"]
    answer = client.chat.completions.create(**ask)
    assert answer.usage.total_tokens <= 96
    assert (answer.usage.total_tokens == 96) == (answer.choices[0].finish_reason == "length")


def test_a_stream_field_by_field(http, client):
    whole = client.chat.completions.create(**ASK)
    *chunks, last = events(http, ASK)
    assert last == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    head = {"object": "chat.completion.chunk", "model": "tiny"}
    fields = {"id", "object", "created", "model", "system_fingerprint", "choices"}
    assert all(chunk.keys() == fields for chunk in chunks)
    assert all(chunk | head == chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(choices) == len(chunks)
    assert all(choice.keys() == {"index", "delta", "logprobs", "finish_reason"} for choice in choices)
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(choice["delta"].keys() == {"content"} and choice["delta"]["content"] for choice in choices[1:-1])
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, whole.choices[0].finish_reason)
    assert "".join(choice["delta"]["content"] for choice in choices[:-1]) == whole.choices[0].message.content


def test_the_counts_come_in_a_chunk_of_their_own(http, client):
    *chunks, counts, done = events(http, {**ASK, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    counts = json.loads(counts)
    assert counts["choices"] == []
    assert counts["usage"] == client.chat.completions.create(**ASK).usage.model_dump(exclude_none=True)


def test_several_answers_in_one_stream(client):
    whole = client.chat.completions.create(**ASK, n=3)
    texts, roles, reasons = ["", "", ""], [0, 0, 0], [None, None, None]
    for chunk in client.chat.completions.create(**ASK, n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert roles == [1, 1, 1]


def test_an_answer_of_a_sentencepiece_model_does_not_begin_with_its_space(data_dir):
    llama2 = Tokenizer.load(data_dir / "tok-llama2")
    row = Row(0, 0, llama2.encode("[/INST]"), 9, SamplingParams(9), llama2)
    deltas = [row.push(token, 0.0, []) for token in llama2.encode("high  plateau")]
    whole, stream = Completion(0, 0), ChatAnswers(llama2, None)
    for delta in deltas:
        whole.push(delta)
    assert whole.text == " high  plateau"
    assert ChatAnswers(llama2, None).whole(0, whole)["message"]["content"] == "high  plateau"
    pieces = [choice["delta"]["content"] for delta in deltas for choice in stream.pieces(0, delta)]
    assert "".join(pieces) == "high  plateau"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, stream):
    ask = {**ASK, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = list(client.chat.completions.create(**ask, stream=True))
        content = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    else:
        content = client.chat.completions.create(**ask).choices[0].logprobs.content
    answer = client.chat.completions.create(**ASK)
    assert len(content) == answer.usage.completion_tokens
    for one in content:
        assert one.logprob <= one.top_logprobs[0].logprob <= 0
        assert len(one.top_logprobs) == 2
    told = bytes(byte for one in content for byte in one.bytes or [])
    assert told.decode("utf-8", "replace") == answer.choices[0].message.content


def test_the_stream_helper_of_the_client(client):
    with client.chat.completions.stream(**ASK) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == client.chat.completions.create(**ASK).choices[0].message.content
