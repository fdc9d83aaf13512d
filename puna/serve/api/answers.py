"""What clients get: OpenAI's answers and stream chunks, for text completions and for chat."""

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from puna.engine.generator import Completion
from puna.engine.row import Delta
from puna.llama.dialog import parse_answer
from puna.llama.tokenizer import Tokenizer
from puna.llama.tools import ToolCall

Object = dict[str, Any]


class Answers(ABC):
    """Puts tokens into the words of one endpoint; one object a request.

    num_top: alternatives to report beside each token; None: no log-probabilities.
    """

    input_field: str
    prefix: str
    whole_kind: str
    chunk_kind: str

    def __init__(self, tokenizer: Tokenizer, num_top: int | None) -> None:
        self.tokenizer, self.num_top = tokenizer, num_top
        self._control = {i: name for name, i in tokenizer.special.items()}

    @abstractmethod
    def whole(self, index: int, done: Completion) -> Object:
        """The choice of a complete answer."""

    @abstractmethod
    def opening(self, index: int) -> list[Object]:
        """Choices that begin a stream, each a chunk of its own."""

    @abstractmethod
    def pieces(self, index: int, delta: Delta) -> list[Object]:
        """Choices of the chunks that one token gives; none while its text is not certain."""

    def shown(self, token: int) -> str:
        """A token as OpenAI shows it: its text, its name, or "bytes:\\x.." where it is only part of a character."""
        data = self.tokenizer.decode_bytes([token])
        try:
            return data.decode() or self._control.get(token, "")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextAnswers(Answers):
    """POST /v1/completions. echoes: what stands before the text of each prompt's samples."""

    input_field = "prompt"
    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, num_top: int | None, n: int, echoes: Sequence[str]) -> None:
        super().__init__(tokenizer, num_top)
        self._n, self._echoes = n, echoes
        self._sent: dict[int, int] = {}

    def whole(self, index: int, done: Completion) -> Object:
        text = self._echoes[index // self._n] + done.text
        return {"index": index, "text": text, "logprobs": self._logprobs(done), "finish_reason": done.finish_reason}

    def opening(self, index: int) -> list[Object]:
        echo = self._echoes[index // self._n]
        return [{"index": index, "text": echo, "logprobs": None, "finish_reason": None}] if echo else []

    def pieces(self, index: int, delta: Delta) -> list[Object]:
        one = Completion(delta.prompt, delta.sample)
        one.push(delta)
        logprobs = self._logprobs(one, self._sent.get(index, 0))
        self._sent[index] = self._sent.get(index, 0) + len(delta.text)
        if not (delta.text or delta.finish_reason or logprobs):
            return []
        return [{"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}]

    def _logprobs(self, done: Completion, offset: int = 0) -> Object | None:
        if self.num_top is None:
            return None
        names, offsets = [self.shown(token) for token in done.tokens], []
        for text in done.texts:
            offsets.append(offset)
            offset += len(text)
        drawn = zip(names, done.logprobs, done.top, strict=True)
        tops = [{self.shown(i): p for i, p in top} | {name: logprob} for name, logprob, top in drawn]
        return {"tokens": names, "token_logprobs": done.logprobs, "top_logprobs": tops, "text_offset": offsets}


class ChatAnswers(Answers):
    """POST /v1/chat/completions. reads_calls: an answer may be calls of tools, which is known at its end only."""

    input_field = "messages"
    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, num_top: int | None, reads_calls: bool = False) -> None:
        super().__init__(tokenizer, num_top)
        self._reads_calls = reads_calls
        self._begun: set[int] = set()
        self._held: dict[int, Completion] = {}

    def whole(self, index: int, done: Completion) -> Object:
        message: Object = {"role": "assistant", "content": self._said(index, done.text), "refusal": None}
        reason: str | None = done.finish_reason
        if calls := self._calls(done):
            message, reason = message | {"content": None, "tool_calls": [_call(call) for call in calls]}, "tool_calls"
        drawn = zip(done.tokens, done.logprobs, done.top, strict=True)
        logprobs = None if self.num_top is None else self._logprobs(drawn)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> list[Object]:
        return [self._chunk(index, {"role": "assistant", "content": "", "refusal": None})]

    def pieces(self, index: int, delta: Delta) -> list[Object]:
        if self._reads_calls:
            return self._pieces_at_end(index, delta)
        logprobs = None if self.num_top is None else self._logprobs([(delta.token, delta.logprob, delta.top)])
        text, chunks = self._said(index, delta.text), []
        if text or logprobs:
            chunks.append(self._chunk(index, {"content": text}, logprobs))
        if delta.finish_reason:
            chunks.append(self._chunk(index, {}, finish_reason=delta.finish_reason))
        return chunks

    def _pieces_at_end(self, index: int, delta: Delta) -> list[Object]:
        """Nothing until the answer is whole; then all of it."""
        held = self._held.setdefault(index, Completion(delta.prompt, delta.sample))
        held.push(delta)
        if not delta.finish_reason:
            return []
        choice = self.whole(index, self._held.pop(index))
        calls = choice["message"].get("tool_calls", [])
        numbered = [{"index": number, **call} for number, call in enumerate(calls)]
        said = {"tool_calls": numbered} if calls else {"content": choice["message"]["content"]}
        end = self._chunk(index, {}, finish_reason=choice["finish_reason"])
        return [self._chunk(index, said, choice["logprobs"]), end]

    def _calls(self, done: Completion) -> tuple[ToolCall, ...]:
        """The calls of an answer that the model itself has ended."""
        ended = bool(done.tokens) and done.tokens[-1] in self.tokenizer.stop_ids
        return parse_answer(self.tokenizer, done.tokens).tool_calls if self._reads_calls and ended else ()

    def _said(self, index: int, text: str) -> str:
        """SentencePiece begins a message with a space, which is no part of it."""
        if not text or index in self._begun:
            return text
        self._begun.add(index)
        return text.removeprefix(" ") if self.tokenizer.has_prefix_space else text

    @staticmethod
    def _chunk(index: int, delta: Object, logprobs: Object | None = None, finish_reason: str | None = None) -> Object:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, drawn: Iterable[tuple[int, float, list[tuple[int, float]]]]) -> Object:
        content = [
            self._entry(token, logprob) | {"top_logprobs": [self._entry(*one) for one in top]}
            for token, logprob, top in drawn
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Object:
        data = list(self.tokenizer.decode_bytes([token]))
        return {"token": self.shown(token), "logprob": logprob, "bytes": data or None}


def _call(call: ToolCall) -> Object:
    asked = {"name": call.name, "arguments": json.dumps(call.arguments)}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": asked}
