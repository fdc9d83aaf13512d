from dataclasses import replace

import pytest
import torch

from puna.engine.generator import Generator
from puna.engine.params import SamplingParams
from puna.engine.row import Row
from puna.errors import NonFinite, TokenizerError, UserError
from puna.llama.model import Llama
from puna.llama.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture
def prompts(tokenizer):
    texts = ["the llama", "def add(a, b):\n    return", "x", "¿qué? 日本語 the high plateau eats grass"]
    return [tokenizer.encode(text, bos=True) for text in texts]


def without_cache(model, tokenizer, prompt, length):
    """Greedy continuation by the whole forward again for every token, and the log-probabilities of its tokens."""
    tokens, scores = list(prompt), []
    with torch.inference_mode():
        while len(scores) < length:
            logits = model(torch.tensor([tokens]))[0, -1]
            tokens.append(int(logits[: tokenizer.vocab_size].argmax()))
            scores.append(float(torch.log_softmax(logits, -1)[tokens[-1]]))
            if tokens[-1] in tokenizer.stop_ids:
                break
    return tokens[len(prompt) :], scores


def test_ragged_greedy_decoding_is_the_full_forward(generator, model, tokenizer, prompts):
    for prompt, done in zip(prompts, generator.generate(prompts, params=GREEDY), strict=True):
        tokens, scores = without_cache(model, tokenizer, prompt, 12)
        assert done.tokens == tokens
        assert done.logprobs == pytest.approx(scores, abs=1e-4)


def test_completions_come_prompt_by_prompt(generator, prompts):
    done = generator.generate(prompts, n=2, params=GREEDY)
    assert [(one.prompt, one.sample) for one in done] == [(p, s) for p in range(4) for s in range(2)]
    assert all(done[2 * p].tokens == done[2 * p + 1].tokens for p in range(4))


def test_a_seeded_request_does_not_depend_on_the_batch(model, tokenizer, prompts):
    params = SamplingParams(max_tokens=16, temperature=1, top_p=0.95, seed=7)
    alone = [Generator(model, tokenizer).generate([prompt], 2, params) for prompt in prompts]
    for max_rows in (1, 3, 32):
        together = Generator(model, tokenizer, max_rows).generate(prompts, 2, params)
        assert [one.tokens for one in together] == [one.tokens for some in alone for one in some]


def test_seeds_and_samples_differ(generator, prompts):
    first, second = generator.generate(prompts[:1], 2, SamplingParams(max_tokens=16, temperature=1, top_p=1, seed=1))
    other = generator.generate(prompts[:1], 1, SamplingParams(max_tokens=16, temperature=1, top_p=1, seed=2))[0]
    assert len({tuple(one.tokens) for one in (first, second, other)}) == 3


def test_without_a_seed_answers_differ(generator, prompts):
    params = SamplingParams(max_tokens=16, temperature=1, top_p=1)
    assert generator.generate(prompts[:1], 1, params)[0].tokens != generator.generate(prompts[:1], 1, params)[0].tokens


def test_text_is_the_decoded_tokens(generator, tokenizer, prompts):
    params = SamplingParams(max_tokens=24, temperature=1.5, top_p=1, seed=3)
    for one in generator.generate(prompts, 4, params):
        assert one.text == tokenizer.decode([token for token in one.tokens if token not in tokenizer.stop_ids])


def test_the_stream_joins_to_the_completion(generator, prompts):
    params = SamplingParams(max_tokens=24, temperature=1.5, top_p=1, seed=3, top_logprobs=2)
    done = generator.generate(prompts[:2], 2, params)
    for one in done:
        stream = generator.stream(prompts[:2], 2, params)
        deltas = [delta for delta in stream if (delta.prompt, delta.sample) == (one.prompt, one.sample)]
        assert [d.token for d in deltas] == one.tokens
        assert "".join(d.text for d in deltas) == one.text
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [one.finish_reason]
        assert all(len(d.top) == 2 and d.logprob <= d.top[0][1] for d in deltas)


def drawn_until(generator, prompts, reason):
    """A completion that ended for `reason`, and the seed that gave it."""
    for seed in range(200):
        params = SamplingParams(max_tokens=30, temperature=1.5, top_p=1, seed=seed)
        for one in generator.generate(prompts, 1, params):
            if one.finish_reason == reason:
                return one, params
    raise AssertionError(f"no completion ended by {reason}")


def test_a_stop_token_ends_the_text_and_is_counted(generator, tokenizer, prompts):
    one, _ = drawn_until(generator, prompts, "stop")
    assert one.tokens[-1] in tokenizer.stop_ids
    assert not tokenizer.stop_ids & set(one.tokens[:-1])
    assert one.text == tokenizer.decode(one.tokens[:-1])


def test_length_is_an_honest_reason(generator, prompts):
    one, params = drawn_until(generator, prompts, "length")
    assert len(one.tokens) == params.max_tokens


def test_a_stop_string_is_never_part_of_the_text(generator, prompts):
    whole = generator.generate(prompts[:1], params=SamplingParams(max_tokens=20, temperature=1, seed=5))[0]
    stop = whole.text[6:9]
    params = SamplingParams(max_tokens=20, temperature=1, seed=5, stop=("not there", stop))
    cut = generator.generate(prompts[:1], params=params)[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text.split(stop)[0]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert "".join(delta.text for delta in generator.stream(prompts[:1], params=params)) == cut.text


def test_the_beginning_of_a_stop_string_is_text_where_nothing_follows(generator, prompts):
    one, params = drawn_until(generator, prompts[:1], "length")
    stopping = replace(params, stop=(one.text[-2:] + "never",))
    assert generator.generate(prompts[:1], params=stopping)[0].text == one.text


def test_without_max_tokens_the_context_ends_the_text(model, tokenizer):
    class Endless(Llama):
        """A model that never stops."""

        def logits(self, hidden, rows=None):
            logits = super().logits(hidden, rows)
            logits[..., list(tokenizer.stop_ids)] = float("-inf")
            return logits

    endless = Endless(model.config)
    endless.load_state_dict(model.state_dict())
    prompts = [tokenizer.encode("the llama", bos=True), [5] * 90]
    for one in Generator(endless, tokenizer).generate(prompts, params=SamplingParams(max_tokens=None, seed=1)):
        assert len(prompts[one.prompt]) + len(one.tokens) == model.config.max_seq_len
        assert one.finish_reason == "length"


def test_ids_without_a_token_are_never_drawn(generator, tokenizer, prompts):
    params = SamplingParams(max_tokens=20, temperature=2, top_p=1, seed=0, top_logprobs=20)
    done = generator.generate(prompts[:1], 20, params)
    assert max(token for one in done for token in one.tokens) < tokenizer.vocab_size
    assert max(token for one in done for top in one.top for token, _ in top) < tokenizer.vocab_size


def test_weights_may_change_between_calls(model, tokenizer, prompts):
    live = Llama(model.config)
    live.load_state_dict(model.state_dict())
    generator = Generator(live, tokenizer)
    before = generator.generate(prompts, params=GREEDY)
    live.init_weights(seed=3)
    assert [one.tokens for one in generator.generate(prompts, params=GREEDY)] != [one.tokens for one in before]


def test_only_the_model_runs_in_inference_mode(model, tokenizer, prompts):
    class Watched(Llama):
        """Notes the mode of every forward."""

        def logits(self, hidden, rows=None):
            modes.append(torch.is_inference_mode_enabled())
            return super().logits(hidden, rows)

    modes, outside = [], []
    watched = Watched(model.config)
    watched.load_state_dict(model.state_dict())
    for _ in Generator(watched, tokenizer).stream(prompts[:1], params=GREEDY):
        outside.append(torch.is_inference_mode_enabled())
    assert set(modes) == {True}
    assert set(outside) == {False}


def test_sentencepiece_text_goes_on_where_the_prompt_ends(data_dir):
    llama2 = Tokenizer.load(data_dir / "tok-llama2")
    params, ids = SamplingParams(4), llama2.encode("high plateau", bos=True)
    after_text = Row(0, 0, ids[:2], 4, params, llama2)
    assert "".join(after_text.push(token, 0.0, []).text for token in ids[2:]) == llama2.decode(ids[2:], continuing=True)
    after_control = Row(0, 0, ids[:1], 4, params, llama2)
    assert "".join(after_control.push(token, 0.0, []).text for token in ids[1:]) == "high plateau"


def test_an_empty_list_of_prompts(generator):
    assert generator.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([345], 1, "token ids outside the vocabulary of 340. Use ids from 0 to 339."),
        ([], 1, "The prompt holds no token. Give at least one token or some text."),
        ([1, 10_000], 1, "The prompt holds token ids outside the vocabulary of"),
        ([-1], 1, "Use ids from 0 to"),
        ([5] * 90, 7, "The prompt has 90 tokens and 7 more were asked for, but this model's context is 96 tokens."),
        ([5] * 96, None, "Shorten the prompt or ask for fewer tokens."),
    ],
)
def test_a_prompt_that_cannot_be_continued(generator, prompt, max_tokens, words):
    with pytest.raises(UserError) as caught:
        generator.stream([[5], prompt], params=SamplingParams(max_tokens=max_tokens))
    assert words in str(caught.value)


def test_a_tokenizer_of_another_model(model, tokenizer):
    small = Llama(model.config.model_copy(update={"vocab_size": tokenizer.vocab_size - 1}))
    with pytest.raises(TokenizerError, match=r"the model only \d+\. Use the tokenizer the model was trained with\."):
        Generator(small, tokenizer)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_damaged_model_is_named(model, tokenizer, prompts, temperature):
    damaged = Llama(model.config)
    with torch.no_grad():
        damaged.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFinite, match="weights may be damaged"):
        Generator(damaged, tokenizer).generate(prompts, params=SamplingParams(8, temperature))
