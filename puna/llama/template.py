"""The chat formats as Jinja templates, for libraries that render by template: they give the ids that `dialog` gives."""

from functools import cache
from pathlib import Path
from typing import Literal

ChatFormat = Literal["llama2", "llama3"]
TEMPLATE_FILE = "chat_template.jinja"
"""Where Hugging Face's libraries look for it, beside the tokenizer."""

_FOLDER = Path(__file__).parent / "templates"


@cache
def chat_template(chat_format: ChatFormat) -> str:
    """The template of a chat format."""
    return (_FOLDER / f"{chat_format}.jinja").read_text(encoding="utf-8")
