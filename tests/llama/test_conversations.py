"""Conversations as rows: targets are what the assistant says; a row, batch or file without any is refused by name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.errors import DataError
from puna.llama.conversations import conversation_batches, read_conversations
from puna.llama.dialog import Message, Style, render
from puna.llama.packing import IGNORED, Batch
from puna.llama.targets import count_targets
from puna.llama.tokenizer import Tokenizer
from puna.llama.tools import ToolCall

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_model

USER, SAID = {"role": "user", "content": "Who eats grass?"}, {"role": "assistant", "content": "The llama."}


@pytest.fixture
def write(tmp_path):
    def write(*lines: Any) -> Path:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


def batches(tiny: Tokenizer, path: Path, seq_len: int = 64, num_rows: int = 2) -> list[Batch]:
    return list(conversation_batches(path, tiny, seq_len=seq_len, num_rows=num_rows))


def test_targets_are_what_the_assistant_says(tiny, write):
    path = write({"messages": [USER, SAID, USER, SAID]}, {"messages": [USER, SAID]}, {"messages": [SAID]})
    first, second = batches(tiny, path)
    assert (first.ids, second.ids) == ((1, 2), (3,))
    said = [*tiny.encode("The llama."), tiny.special["<|eot_id|>"]]
    assert [row[row != IGNORED].tolist() for row in first.targets] == [said * 2, said]
    assert (first.weight, second.weight) == (3 * len(said), len(said))
    rendered = render(tiny, [Message("user", "Who eats grass?"), Message("assistant", "The llama.")], prompt=False)
    length = len(rendered.ids) - 1
    assert first.tokens[1, :length].tolist() == rendered.ids[:-1]
    assert (first.targets[1, length:] == IGNORED).all()
    where = first.targets[0] != IGNORED
    assert torch.equal(first.targets[0][:-1][where[:-1]], first.tokens[0][1:][where[:-1]])


def test_the_loss_sees_the_mask_alone(tiny, write):
    """Another question changes the loss only through attention; a masked token's own loss is not in it."""
    model = tiny_model(tiny)
    (batch,) = batches(tiny, write({"messages": [USER, SAID]}))
    logits = model(batch.tokens).log_softmax(-1)
    picked = batch.targets != IGNORED
    expected = -logits[picked].gather(1, batch.targets[picked][:, None]).sum()
    assert torch.allclose(model(batch.tokens, batch.targets), expected, rtol=1e-5)


def test_calls_and_tools(tiny, write):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "f"}}
    line = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}
    ((number, rendered),) = read_conversations(write(line), tiny, 1000)
    messages = [Message("user", "Who eats grass?"), Message("assistant", tool_calls=(ToolCall("f", {"a": 1}),))]
    assert (number, rendered) == (1, render(tiny, messages, Style(tools=(tool,)), prompt=False))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not a conversation: JSONDecodeError"),
        ("5", "line 2 is not a conversation: TypeError"),
        ({"prompt": "x"}, "line 2 is not a conversation: KeyError('messages')"),
        ({"messages": [{"role": "user"}]}, "line 2 is not a conversation: KeyError('content')"),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "line 2 is not a conversation: TypeError('content must be",
        ),
        ({"messages": [{"role": "boss", "content": "x"}]}, "line 2: Message 0 has the role 'boss'. Roles are system"),
        ({"messages": []}, "line 2: The dialog has no messages"),
    ],
)
def test_a_line_that_is_no_conversation(tiny, write, line, words):
    path = write({"messages": [USER, SAID]}, line)
    with pytest.raises(DataError) as error:
        batches(tiny, path)
    assert str(error.value).startswith(f"{path}, ")
    assert words in str(error.value)


def test_invalid_utf8_names_its_line(tiny, write):
    path = write({"messages": [USER, SAID]})
    path.write_bytes(path.read_bytes() + b'{"messages": [{"role": "user", "content": "\xff"}]}\n')
    with pytest.raises(DataError, match="line 2 is not a conversation: UnicodeDecodeError"):
        batches(tiny, path)


# --- what does not train


def test_counts(tiny, write):
    counted = count_targets("chats", batches(tiny, write({"messages": [USER, SAID]}), num_rows=1))
    assert (counted.num_rows, counted.num_targets) == (1, len(tiny.encode("The llama.")) + 1)
    assert 0 < counted.share < 1
    assert counted.share == counted.num_targets / counted.num_tokens


def test_a_masked_row_stops_with_its_name(tiny, write):
    path = write({"messages": [USER, SAID]}, {"messages": [USER]}, {"messages": [USER, SAID]})
    with pytest.raises(DataError) as error:
        count_targets(str(path), batches(tiny, path), "line")
    assert str(error.value).startswith(
        f"line 2 of {path} has no target token: it would train nothing. Every token of it"
    )


def test_a_row_masked_by_its_length_stops_with_its_name(tiny, write):
    long = {"role": "user", "content": "grass " * 50}
    path = write({"messages": [USER, SAID]}, {"messages": [long, SAID]})
    with pytest.raises(DataError, match="line 2 of "):
        count_targets(str(path), batches(tiny, path), "line")


def test_a_masked_batch_stops_with_its_name(tiny, write):
    path = write(*[{"messages": [USER, SAID]}] * 2, *[{"messages": [USER]}] * 2)
    with pytest.raises(DataError) as error:
        count_targets(str(path), batches(tiny, path), "line")
    assert str(error.value).startswith(f"batch 1 of {path} (line 3, line 4) has no target token. Every token of it is")


def test_a_masked_data_set_stops_with_its_name(tiny, write):
    path = write(*[{"messages": [USER]}] * 3)
    with pytest.raises(DataError) as error:
        count_targets(str(path), batches(tiny, path), "line")
    assert str(error.value).startswith(f"{path} has no target token in any of the 3 rows that were read of it")


def test_an_empty_data_set_stops_with_its_name(tiny, write):
    path = write()
    with pytest.raises(DataError, match="has no target token in any of the 0 rows"):
        count_targets(str(path), batches(tiny, path))
