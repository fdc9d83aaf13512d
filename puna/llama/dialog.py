"""Chat formats: messages to token ids and back. The one renderer of training, evaluation and serving.

Llama 3 wraps each message in header tokens; Llama 2 writes tags as ordinary text between BOS and EOS. What a message
says is always plain text: no string in it becomes a control id.

The reference (llama-models, llama) decides every id; `Style.trim` asks for the dialect of Hugging Face's templates.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

from puna.errors import DataError
from puna.llama.tokenizer import (
    BEGIN_OF_TEXT,
    END_HEADER,
    END_OF_MESSAGE,
    END_OF_TURN,
    PYTHON_TAG,
    START_HEADER,
    Tokenizer,
)
from puna.llama.tools import CODE, Dialect, ToolCall, Wire, describe, ends_message, read, write, write_hugging_face

Role = Literal["system", "user", "assistant", "tool", "ipython"]
ROLES = ("system", "user", "assistant", "tool", "ipython")
Stop = Literal["eot", "eom"]
STOPS: dict[str, str] = {"eot": END_OF_TURN, "eom": END_OF_MESSAGE}
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
ENVIRONMENT = "Environment: ipython"
CUTOFF = "Cutting Knowledge Date: December 2023"
TEMPLATE_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Message:
    """One message of a dialog. A tool's answer has the role tool, which ipython is another name of.

    tool_calls: of an assistant, instead of content. stop: what ends an assistant's message, where it is not what the
    format writes there: eot hands the turn over, eom keeps it.
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    stop: Stop | None = None


@dataclass(frozen=True)
class Style:
    """How a dialog is written.

    dialect: of custom functions' calls. trim: as Hugging Face's templates do. tools: functions the model is told of, in
    OpenAI's form. builtins: names of built-in tools that are enabled. date: of the system message, such as
    "05 January 2025"; with trim, which always writes one, the template's own where None.
    """

    dialect: Dialect = "json"
    trim: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    builtins: tuple[str, ...] = ()
    date: str | None = None


REFERENCE = Style()


@dataclass(frozen=True)
class Rendered:
    """Token ids of a dialog, and which of them the model is trained to say: what an assistant says, and its end."""

    ids: list[int]
    trained: list[bool]

    @property
    def num_targets(self) -> int:
        """Tokens that train."""
        return sum(self.trained)


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], style: Style = REFERENCE, *, prompt: bool = True
) -> Rendered:
    """A dialog in the format that the tokenizer has control tokens for.

    prompt: it ends where the assistant begins to speak; else with the last message, as training data does. Raises
    DataError, which names the message, for an empty dialog, an unknown role and what the format cannot say.
    """
    if not messages:
        raise DataError("The dialog has no messages", "Give at least one message with the role user.")
    for number, message in enumerate(messages):
        _check(number, message)
    write_dialog = _llama3 if tokenizer.chat_format == "llama3" else _llama2
    pieces = list(write_dialog(tokenizer, messages, style, prompt))
    ids = [i for piece, _ in pieces for i in piece]
    return Rendered(ids, [trained for piece, trained in pieces for _ in piece])


def parse(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Message]:
    """The messages of a rendered dialog, without the open header (or the lack of an answer) at the end of a prompt.

    Inverse of `render` in the reference's style; docs/dialog.md says which answers read as something else. Raises
    DataError, which names the place, for ids that are no dialog.
    """
    return list((_parse_llama3 if tokenizer.chat_format == "llama3" else _parse_llama2)(tokenizer, list(ids)))


def parse_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> Message:
    """What the model said: the ids it drew after a prompt, with or without the token that ended it."""
    ids, special = list(ids), tokenizer.special
    if tokenizer.chat_format == "llama2":
        return Message("assistant", tokenizer.decode(i for i in ids if i != tokenizer.eos).strip())
    stop = ids.pop() if ids and ids[-1] in tokenizer.stop_ids else None
    tagged = ids[:1] == [special.get(PYTHON_TAG)]
    return _assistant(tokenizer.decode(ids), tagged, "eom" if stop == special.get(END_OF_MESSAGE) else "eot")


def parse_answer_text(text: str) -> Message:
    """The same for text that shows control tokens by name, in or without an assistant header, as the reference does."""
    text = text.strip(" ").removeprefix(f"{START_HEADER}assistant{END_HEADER}\n\n")
    tagged, text = text.startswith(PYTHON_TAG), text.removeprefix(PYTHON_TAG)
    stop: Stop = "eom" if text.endswith(END_OF_MESSAGE) else "eot"
    return _assistant(text.removesuffix(STOPS[stop]), tagged, stop)


def _check(number: int, message: Message) -> None:
    if message.role not in ROLES:
        raise DataError(f"Message {number} has the role {message.role!r}", f"Roles are {', '.join(ROLES)}.")
    if message.role != "assistant" and (message.tool_calls or message.stop):
        raise DataError(f"Message {number} of the {message.role} calls a tool", "Only the assistant can.")
    if message.tool_calls and message.content:
        problem = f"Message {number} of the assistant has both content and tool calls"
        raise DataError(problem, "The formats carry one or the other; split it into two messages, or leave one out.")


# --- Llama 3 --------------------------------------------------------------------------------------------------------

Piece = tuple[Sequence[int], bool]
"""Ids, and whether the model is trained to say them."""


def _llama3(tokenizer: Tokenizer, messages: Sequence[Message], style: Style, prompt: bool) -> Iterator[Piece]:
    """Header, content, terminator of each message; then, for a prompt, an open assistant header."""
    composed = compose(messages, style)
    ipython = _has_environment(composed)
    first = len(messages) - len(composed)
    yield [tokenizer.special[BEGIN_OF_TEXT]], False
    for number, (message, following) in enumerate(zip_longest(composed, composed[1:]), first):
        yield _header(tokenizer, "ipython" if message.role == "tool" else message.role), False
        answered = following is not None and following.role in ("tool", "ipython")
        try:
            wire = _wire(message, style, ipython, answered)
        except ValueError as error:
            problem = f"Message {number} of the assistant cannot be written: {error}"
            raise DataError(problem, "Change the call, or choose another dialect.") from error
        stop = STOPS[message.stop or ("eom" if wire.ends_message else "eot")]
        tag = [_control(tokenizer, PYTHON_TAG)] if wire.tagged else []
        yield [*tag, *tokenizer.encode(wire.text), _control(tokenizer, stop)], message.role == "assistant"
    if prompt:
        yield _header(tokenizer, "assistant"), False


def _wire(message: Message, style: Style, ipython: bool, answered: bool) -> Wire:
    if not message.tool_calls:
        return Wire(message.content, False, False)
    if style.trim:
        return write_hugging_face(message.tool_calls, style.builtins)
    return write(message.tool_calls, style.dialect, ipython=ipython, answered=answered)


def _control(tokenizer: Tokenizer, name: str) -> int:
    if name not in tokenizer.special:
        raise DataError(f"The tokenizer has no control token {name}", "Tools need the tokenizer of Llama 3.1 or later.")
    return tokenizer.special[name]


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    start, end = tokenizer.special[START_HEADER], tokenizer.special[END_HEADER]
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]


def compose(messages: Sequence[Message], style: Style) -> list[Message]:
    """The messages that are written: trimmed, and with what the style says of tools and dates put into them.

    Reference: Environment, Tools and date lines go before the system text, each where there is something to say.
    Hugging Face: a system message with the date is always there. Functions are described in the first user message for
    the JSON dialects, in the system message for the others. Raises DataError where there is no user message for them.
    """
    messages = [_trimmed(message) for message in messages] if style.trim else list(messages)
    system = messages.pop(0).content if messages and messages[0].role == "system" else None
    functions = describe(style.tools, "hugging_face" if style.trim else style.dialect) if style.tools else ""
    if functions and (style.trim or style.dialect == "json"):
        if not messages or messages[0].role != "user":
            raise DataError("There is no user message to describe the tools in", "Begin the dialog with the user.")
        messages[0] = replace(messages[0], content=f"{functions}\n\n{messages[0].content}")
        functions = ""
    if style.trim:
        return [Message("system", _head_hugging_face(style) + (system or "")), *messages]
    parts = [part for part in (_head(style), functions) if part] + ([] if system is None else [system])
    return [Message("system", "\n\n".join(parts)), *messages] if parts else messages


def _trimmed(message: Message) -> Message:
    """As the template: content without space around it, but a tool's answer as a JSON string."""
    is_answer = message.role in ("tool", "ipython")
    content = json.dumps(message.content, ensure_ascii=False) if is_answer else message.content.strip()
    return replace(message, content=content)


def _head(style: Style) -> str:
    lines = []
    if style.builtins or (style.tools and style.dialect != "python_list"):
        lines.append(ENVIRONMENT)
    if listed := _listed(style):
        lines.append(f"Tools: {listed}")
    if style.date:
        lines += [CUTOFF, f"Today Date: {style.date}"]
    return "\n".join(lines)


def _head_hugging_face(style: Style) -> str:
    environment = f"{ENVIRONMENT}\n" if style.builtins or style.tools else ""
    listed = f"Tools: {_listed(style)}\n\n" if style.builtins else ""
    return f"{environment}{listed}{CUTOFF}\nToday Date: {style.date or TEMPLATE_DATE}\n\n"


def _listed(style: Style) -> str:
    return ", ".join(name for name in style.builtins if name != CODE)


def _has_environment(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[0].role == "system" and ENVIRONMENT in messages[0].content.split("\n")


def _parse_llama3(tokenizer: Tokenizer, ids: list[int]) -> Iterator[Message]:
    special = tokenizer.special
    ends = {special.get(name) for name in STOPS.values()}
    if ids[:1] != [special[BEGIN_OF_TEXT]]:
        raise _no_dialog(0, f"{BEGIN_OF_TEXT} must stand there")
    place, ipython = 1, False
    while place < len(ids):
        body = _next(ids, place, {special[END_HEADER]}) + 1
        end = _next(ids, body, ends)
        if ids[place] != special[START_HEADER] or body > len(ids):
            raise _no_dialog(place, "a message's header must begin there")
        role = tokenizer.decode(ids[place + 1 : body - 1])
        if end == len(ids):
            if role == "assistant" and tokenizer.decode(ids[body:]) == "\n\n":
                return
            raise _no_dialog(place, "a message begins that has no end")
        content, tagged = _content(tokenizer, ids, body, end)
        if role not in ROLES or (tagged and role != "assistant"):
            raise _no_dialog(place, f"a message of the role {role!r} {'has a tag' if tagged else 'begins'}")
        if role == "assistant":
            yield _assistant(content, tagged, "eom" if ids[end] == special.get(END_OF_MESSAGE) else "eot", ipython)
        else:
            message = Message("tool" if role == "ipython" else role, content)  # type: ignore[arg-type]
            ipython = ipython or (place == 1 and _has_environment([message]))
            yield message
        place = end + 1


def _next(ids: list[int], start: int, wanted: Collection[int | None]) -> int:
    """The first place from `start` on that holds one of `wanted`; the end where none does."""
    return next((i for i in range(start, len(ids)) if ids[i] in wanted), len(ids))


def _content(tokenizer: Tokenizer, ids: list[int], start: int, end: int) -> tuple[str, bool]:
    """Text of the body of a message, and whether the python tag stands before it."""
    controls = set(tokenizer.special.values())
    found = [i for i in range(start, end) if ids[i] in controls]
    text = tokenizer.decode(ids[start:end])
    if not text.startswith("\n\n"):
        raise _no_dialog(start, "an empty line must follow the header")
    tagged = [ids[i] for i in found] == [tokenizer.special.get(PYTHON_TAG)]
    if found and not (tagged and tokenizer.decode(ids[start : found[0]]) == "\n\n"):
        raise _no_dialog(found[0], "a control token stands inside a message")
    return text.removeprefix("\n\n"), tagged


def _assistant(content: str, tagged: bool, stop: Stop, ipython: bool = False) -> Message:
    calls, form = read(content, tagged)
    usual = "eom" if ends_message(form, ipython) else "eot"
    return Message("assistant", "" if calls else content, calls, None if stop == usual else stop)


def _no_dialog(place: int, problem: str) -> DataError:
    return DataError(f"The ids are no dialog: at {place}, {problem}", "Give ids that `render` made.")


# --- Llama 2 --------------------------------------------------------------------------------------------------------


def _llama2(tokenizer: Tokenizer, messages: Sequence[Message], style: Style, prompt: bool) -> Iterator[Piece]:
    """Llama 2: the system message inside the first user message; user and assistant in turn, for a prompt user last."""
    if style.tools or style.builtins or style.date or any(message.tool_calls or message.stop for message in messages):
        problem = "Llama 2's chat format has no tools and no date"
        raise DataError(problem, "Leave them out, or use a tokenizer of Llama 3.")
    turns = _fold_system(messages)
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            problem = f"Turn {number} has the role {turn.role} where Llama 2's format has {expected}"
            raise DataError(problem, "After one system message at most, begin with user and alternate with assistant.")
    if prompt and turns[-1].role != "user":
        raise DataError("The last message is from the assistant", "Llama 2's format ends with a user message.")
    if not prompt and turns[-1].role != "assistant":
        raise DataError("The last message is from the user", "Training data of Llama 2 ends with an assistant message.")
    for user, assistant in zip(turns[::2], turns[1::2], strict=False):
        asked = tokenizer.encode(_instruction(user))
        ids = tokenizer.encode(f"{_instruction(user)} {assistant.content.strip()} ")
        answer = next((n for n, (a, b) in enumerate(zip(asked, ids, strict=False)) if a != b), len(asked))
        yield [tokenizer.bos, *ids[:answer]], False
        yield [*ids[answer:], tokenizer.eos], True
    if prompt:
        yield tokenizer.encode(_instruction(turns[-1]), bos=True), False


def _instruction(user: Message) -> str:
    return f"[INST] {user.content.strip()} [/INST]"


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    for number, message in enumerate(messages):
        for tag in LLAMA2_TAGS:
            if tag in message.content:
                problem = f"Message {number} contains {tag}, a tag of Llama 2's chat format"
                raise DataError(problem, "Take the tag out of the text; it would end the message early.")
    if messages[0].role != "system":
        return list(messages)
    if len(messages) == 1:
        raise DataError("The dialog has only a system message", "Add a user message.")
    system, first = messages[:2]
    folded = f"<<SYS>>\n{system.content}\n<</SYS>>\n\n{first.content}"
    return [Message(first.role, folded), *messages[2:]]


def _parse_llama2(tokenizer: Tokenizer, ids: list[int]) -> Iterator[Message]:
    for number, (start, turn) in enumerate(_turns(tokenizer, ids)):
        text = tokenizer.decode(turn)
        asked, ended, answer = text.removeprefix("[INST] ").partition(" [/INST]")
        if not text.startswith("[INST] ") or not ended:
            raise _no_dialog(start, "[INST] and [/INST] must stand around what the user says")
        if number == 0 and asked.startswith("<<SYS>>\n"):
            folded = asked.removeprefix("<<SYS>>\n") + "\n\n"  # what stripping took from an empty user message
            system, _, asked = folded.partition("\n<</SYS>>\n\n")
            asked = asked.removesuffix("\n\n")
            yield Message("system", system)
        yield Message("user", asked)
        if turn[-1] == tokenizer.eos:
            yield Message("assistant", answer.strip())


def _turns(tokenizer: Tokenizer, ids: list[int]) -> Iterable[tuple[int, list[int]]]:
    """Place and ids of each piece between BOS and BOS, without it."""
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos]
    if starts[:1] != [0]:
        raise _no_dialog(0, "BOS must stand there")
    return [(start, ids[start + 1 : end]) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
