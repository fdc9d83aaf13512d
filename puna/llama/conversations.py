"""Conversations as training rows: a file of JSON lines, rendered with the loss mask that the renderer gives.

A line is {"messages": [{"role", "content"} or {"role": "assistant", "tool_calls": [...]}, ...], "tools": [...]}, as in
OpenAI's API; the arguments of a call are an object or a string that holds one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from puna.errors import DataError
from puna.llama.dialog import REFERENCE, Message, Rendered, Style, render
from puna.llama.packing import IGNORED, Batch
from puna.llama.tokenizer import Tokenizer
from puna.llama.tools import ToolCall

FORM = 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} a line.'


def read_conversations(
    path: Path, tokenizer: Tokenizer, seq_len: int, style: Style = REFERENCE
) -> Iterator[tuple[int, Rendered]]:
    """Line number and the first `seq_len` + 1 tokens of each conversation. Raises DataError, which names the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                messages, tools = _conversation(json.loads(line))
                whole = render(tokenizer, messages, replace(style, tools=(*style.tools, *tools)), prompt=False)
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error.problem}", error.fix) from None
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}, line {number} is not a conversation: {error!r}", FORM) from None
            yield number, Rendered(whole.ids[: seq_len + 1], whole.trained[: seq_len + 1])


def conversation_batches(
    path: Path, tokenizer: Tokenizer, *, seq_len: int, num_rows: int, style: Style = REFERENCE
) -> Iterator[Batch]:
    """Batches of at most `num_rows` conversations, a row each, padded on the right; `ids` are the line numbers.

    Tokens of the mask, and they alone, are targets of the token before them.
    """
    lines = read_conversations(path, tokenizer, seq_len, style)
    while rows := list(islice(lines, num_rows)):
        yield _batch(rows, tokenizer.eos)


def _batch(rows: list[tuple[int, Rendered]], pad: int) -> Batch:
    length = max(len(row.ids) for _, row in rows) - 1
    tokens, targets = torch.full((len(rows), length), pad), torch.full((len(rows), length), IGNORED)
    for place, (_, row) in enumerate(rows):
        end = len(row.ids) - 1
        tokens[place, :end] = torch.tensor(row.ids[:-1])
        follows = torch.tensor(row.ids[1:])
        targets[place, :end] = torch.where(torch.tensor(row.trained[1:]), follows, IGNORED)
    weight = int((targets != IGNORED).sum())
    return Batch(tokens, targets, torch.zeros_like(tokens), tuple(number for number, _ in rows), weight)


def _conversation(raw: Mapping[str, Any]) -> tuple[list[Message], tuple[Mapping[str, Any], ...]]:
    return [_message(one) for one in raw["messages"]], tuple(raw.get("tools") or ())


def _message(raw: Mapping[str, Any]) -> Message:
    calls = tuple(_call(one["function"]) for one in raw.get("tool_calls") or ())
    content = raw.get("content") if calls else raw["content"]
    if not isinstance(content or "", str):
        raise TypeError("content must be text")
    return Message(raw["role"], content or "", calls)


def _call(raw: Mapping[str, Any]) -> ToolCall:
    arguments = raw["arguments"]
    return ToolCall(raw["name"], dict(json.loads(arguments) if isinstance(arguments, str) else arguments))
