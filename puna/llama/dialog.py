"""Chat formats: messages to token ids that end where the assistant begins to speak.

Llama 3 wraps each message in header tokens; Llama 2 writes tags as ordinary text between BOS and EOS. What a message
says is always plain text: no string in it becomes a control id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.errors import DataError
from puna.llama.tokenizer import BEGIN_OF_TEXT, END_HEADER, END_OF_TURN, START_HEADER, Tokenizer

Role = Literal["system", "user", "assistant", "tool", "ipython"]
ROLES = ("system", "user", "assistant", "tool", "ipython")
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


@dataclass(frozen=True)
class Message:
    """One message of a dialog."""

    role: Role
    content: str


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a dialog, ready for the model's answer, in the format that the tokenizer has control tokens for.

    Raises DataError for an empty dialog, an unknown role, and what the Llama 2 format cannot say.
    """
    if not messages:
        raise DataError("The dialog has no messages", "Give at least one message with the role user.")
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise DataError(f"Message {number} has the role {message.role!r}", f"Roles are {', '.join(ROLES)}.")
    return (_llama3 if START_HEADER in tokenizer.special else _llama2)(tokenizer, messages)


def _llama3(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Llama 3: header, content, end of turn; then an open assistant header. Role tool is written ipython."""
    ids = [tokenizer.special[BEGIN_OF_TEXT]]
    for message in messages:
        role = "ipython" if message.role == "tool" else message.role
        ids += [*_header(tokenizer, role), *tokenizer.encode(message.content), tokenizer.special[END_OF_TURN]]
    return ids + _header(tokenizer, "assistant")


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    start, end = tokenizer.special[START_HEADER], tokenizer.special[END_HEADER]
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]


def _llama2(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Llama 2: the system message inside the first user message; user and assistant in turn, the user last."""
    turns = _fold_system(messages)
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            problem = f"Turn {number} has the role {turn.role} where Llama 2's format has {expected}"
            raise DataError(problem, "After one system message at most, begin with user and alternate with assistant.")
    if turns[-1].role != "user":
        raise DataError("The last message is from the assistant", "Llama 2's format ends with a user message.")
    ids: list[int] = []
    for user, assistant in zip(turns[0:-1:2], turns[1::2], strict=True):
        ids += tokenizer.encode(f"{_instruction(user)} {assistant.content.strip()} ", bos=True, eos=True)
    return ids + tokenizer.encode(_instruction(turns[-1]), bos=True)


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
