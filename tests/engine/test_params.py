import pytest

from puna.engine.params import SamplingParams
from puna.errors import UserError


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_tokens", 0, "max_tokens is 0. Ask for at least 1 token."),
        ("temperature", -0.1, "temperature is -0.1. Give a value between 0 (greedy) and 2."),
        ("temperature", 2.1, "temperature is 2.1. Give a value between 0 (greedy) and 2."),
        ("temperature", float("nan"), "temperature is nan."),
        ("top_p", 1.1, "top_p is 1.1. Give a share between 0 and 1."),
        ("stop", ("x", ""), "stop is ('x', ''). Give stop strings of at least one character."),
        ("top_logprobs", 21, "top_logprobs is 21. Ask for 0 to 20 alternatives."),
    ],
)
def test_a_bad_value_is_named(name, value, words):
    with pytest.raises(UserError) as caught:
        SamplingParams(**{name: value})
    assert words in str(caught.value)
