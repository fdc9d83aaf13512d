"""POST /v1/completions through the official client."""

import math

import pytest

from puna.engine.params import SamplingParams

SEEDED = {"model": "tiny", "temperature": 1, "seed": 5}


def test_a_completion_is_the_engines(client, generator):
    answer = client.completions.create(prompt="the llama", max_tokens=12, top_p=0.9, **SEEDED)
    prompt = generator.tokenizer.encode("the llama", bos=True)
    expected = generator.generate([prompt], params=SamplingParams(12, 1, 0.9, 5))[0]
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected.text, expected.finish_reason, 0)
    assert choice.logprobs is None
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.id.startswith("cmpl-")
    counts = (len(prompt), len(expected.tokens), len(prompt) + len(expected.tokens))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == counts


def test_defaults_are_openais(client):
    ask = {"model": "tiny", "prompt": "the", "seed": 3}
    explicit = client.completions.create(**ask, max_tokens=16, temperature=1, top_p=1, n=1)
    assert client.completions.create(**ask).choices == explicit.choices


def test_token_ids_are_a_prompt(client, generator):
    ids = generator.tokenizer.encode("the llama", bos=True)
    by_text = client.completions.create(prompt="the llama", **SEEDED)
    assert client.completions.create(prompt=ids, **SEEDED).choices[0].text == by_text.choices[0].text
    assert client.completions.create(prompt=[ids, ids], **SEEDED).choices[1].text == by_text.choices[0].text


def test_choices_come_prompt_by_prompt(client):
    answer = client.completions.create(prompt=["the", "def add"], n=2, **SEEDED)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = client.completions.create(prompt="def add", n=2, **SEEDED)
    assert [choice.text for choice in answer.choices[2:]] == [choice.text for choice in alone.choices]
    assert alone.choices[0].text != alone.choices[1].text


def test_a_stop_string_ends_the_text(client):
    whole = client.completions.create(prompt="the", max_tokens=30, **SEEDED).choices[0].text
    stop = whole[4:6]
    for given in (stop, ["never there", stop]):
        choice = client.completions.create(prompt="the", max_tokens=30, stop=given, **SEEDED).choices[0]
        assert (choice.text, choice.finish_reason) == (whole.split(stop)[0], "stop")


def test_echo_puts_the_prompt_before_the_text(client):
    text = client.completions.create(prompt="the llama", **SEEDED).choices[0].text
    assert client.completions.create(prompt="the llama", echo=True, **SEEDED).choices[0].text == "the llama" + text
    stream = client.completions.create(prompt="the llama", echo=True, stream=True, **SEEDED)
    assert "".join(chunk.choices[0].text for chunk in stream) == "the llama" + text


def test_logprobs(client):
    choice = client.completions.create(prompt="the llama", logprobs=2, max_tokens=8, **SEEDED).choices[0]
    drawn = choice.logprobs
    assert len(drawn.tokens) == len(drawn.token_logprobs) == len(drawn.top_logprobs) == len(drawn.text_offset)
    for token, logprob, top in zip(drawn.tokens, drawn.token_logprobs, drawn.top_logprobs, strict=True):
        assert top[token] == logprob <= max(top.values()) <= 0
        assert 2 <= len(top) <= 3
    assert drawn.text_offset == sorted(drawn.text_offset)
    whole = [token for token in drawn.tokens if not token.startswith(("bytes:", "<|"))]
    assert all(token in choice.text for token in whole)


def test_half_a_character_is_shown_as_bytes(client, generator):
    half = generator.tokenizer.encode("🦙é")[0]
    hot = {"model": "tiny", "temperature": 2, "seed": 1}
    answers = client.completions.create(prompt=[[half]], logprobs=5, max_tokens=40, n=8, **hot)
    names = {token for choice in answers.choices for token in choice.logprobs.tokens}
    assert any(name.startswith("bytes:\\x") for name in names)
    assert not any("�" in name for name in names)


def test_a_stream_joins_to_the_answer(client):
    ask = {"prompt": ["the", "def add"], "n": 2, "max_tokens": 12, "logprobs": 1, **SEEDED}
    answer = client.completions.create(**ask)
    chunks = list(client.completions.create(stream=True, **ask))
    for choice in answer.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [item for piece in mine for item in getattr(piece.logprobs, name)]
            assert joined == getattr(choice.logprobs, name), name
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stream_ends_with_counts_when_asked(client):
    ask = {"prompt": "the llama", "max_tokens": 9, **SEEDED}
    *chunks, last = client.completions.create(stream=True, stream_options={"include_usage": True}, **ask)
    assert last.choices == []
    assert last.usage == client.completions.create(**ask).usage
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_finish_reasons_are_honest(client, reason):
    for seed in range(60):
        hot = {"model": "tiny", "temperature": 2, "seed": seed}
        answer = client.completions.create(prompt="x", max_tokens=20, logprobs=0, **hot)
        choice = answer.choices[0]
        if choice.finish_reason != reason:
            continue
        ended = choice.logprobs.tokens[-1] in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        assert ended == (reason == "stop")
        assert (answer.usage.completion_tokens == 20) or reason == "stop"
        assert math.isfinite(sum(choice.logprobs.token_logprobs))
        return
    raise AssertionError(f"no answer ended by {reason}")
