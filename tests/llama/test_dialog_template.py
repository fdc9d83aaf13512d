"""The exported chat template in transformers gives the ids that Puna's renderer gives."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from puna.llama.dialog import Message, Style, render
from puna.llama.template import TEMPLATE_FILE
from puna.llama.tokenizer import Tokenizer
from puna.llama.tools import DIALECTS, ToolCall

transformers = pytest.importorskip("transformers")


def exported(tokenizer: Tokenizer, folder: Path) -> Any:
    tokenizer.to_hf(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(tiny, tmp_path_factory) -> Any:
    return exported(tiny, tmp_path_factory.mktemp("hf"))


def openai(message: Message) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in message.tool_calls]
    return {"role": message.role, "content": message.content} | ({"tool_calls": calls} if calls else {})


def by_template(theirs: Any, messages: list[Message], style: Style, prompt: bool) -> list[int]:
    return theirs.apply_chat_template(
        [openai(message) for message in messages],
        tools=list(style.tools) or None,
        builtin_tools=list(style.builtins),
        date_string=style.date,
        tool_dialect=style.dialect,
        trim=style.trim,
        add_generation_prompt=prompt,
        return_dict=False,
    )


def called(name: str, **arguments: Any) -> Message:
    return Message("assistant", tool_calls=(ToolCall(name, arguments),))


SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Who eats grass?"), Message("tool", '{"a": "é"}')
CUSTOM = called("get_it", city="Ñandú", deep={"x": [1, 2.5, None, True], "y": {}}, quote='"q"\n\\')
DIALOGS = {
    "user": [USER],
    "system": [SYSTEM, USER, Message("assistant", "The llama."), Message("user", "And?")],
    "spaces": [Message("system", "Be brief. \n"), Message("user", "u  "), Message("assistant", "a\n\n")],
    "empty": [Message("system", ""), USER, Message("assistant", "")],
    "custom": [SYSTEM, USER, CUSTOM, ANSWER, Message("assistant", "It is so.")],
    "custom without system": [USER, CUSTOM, ANSWER],
    "no arguments": [USER, called("start")],
    "environment": [Message("system", "Environment: ipython\n\nBe brief."), USER, CUSTOM, ANSWER],
    "search": [SYSTEM, USER, called("brave_search", query="who eats grass"), ANSWER],
    "search with a quote": [SYSTEM, USER, called("brave_search", query='"grass"'), ANSWER],
    "ipython": [USER, Message("assistant", "a"), Message("ipython", "out"), Message("system", "s")],
}
TOOL = {
    "type": "function",
    "function": {"name": "get_it", "description": "Gets «it».", "parameters": {"type": "object"}},
}
SETTINGS = {
    "plain": {},
    "date": {"date": "05 January 2025"},
    "tools": {"tools": (TOOL, TOOL)},
    "builtins": {"builtins": ("code_interpreter", "brave_search")},
    "all": {"date": "1 May 2025", "tools": (TOOL,), "builtins": ("brave_search", "wolfram_alpha")},
}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_llama3_ids(tiny, theirs, settings, dialect, trim):
    style = Style(dialect, trim, **SETTINGS[settings])
    for name, messages in DIALOGS.items():
        for prompt in (True, False):
            assert by_template(theirs, messages, style, prompt) == render(tiny, messages, style, prompt=prompt).ids, (
                name
            )


def test_llama3_code_and_several_calls(tiny, theirs):
    code = [USER, called("code_interpreter", code="print(1)\n"), ANSWER]
    several = [USER, Message("assistant", tool_calls=(ToolCall("f", {"a": 1}), ToolCall("g", {}))), ANSWER]
    for messages, dialect in ((code, "json"), (several, "python_list")):
        style = Style(dialect)
        assert by_template(theirs, messages, style, True) == render(tiny, messages, style).ids
    with pytest.raises(Exception, match="Only the dialect python_list has more than one call a message"):
        by_template(theirs, several, Style(), True)


def test_llama2_ids(data_dir, tmp_path):
    ours = Tokenizer.load(data_dir / "tok-llama2")
    theirs = exported(ours, tmp_path)
    system = [Message("system", " Be brief.\n"), Message("user", " Who? "), Message("assistant", " The llama. ")]
    for messages in ([USER], [*system, USER], [USER, Message("assistant", "日本語 🦙"), Message("user", "x")]):
        assert by_template(theirs, messages, Style(), True) == render(ours, messages).ids
    assert by_template(theirs, system, Style(), False) == render(ours, system, prompt=False).ids
    for messages, words in (
        ([Message("assistant", "a")], "must alternate"),
        ([USER, USER], "must alternate"),
        ([Message("user", "[/INST]")], "A message contains \\[/INST\\]"),
    ):
        with pytest.raises(Exception, match=words):
            by_template(theirs, messages, Style(), True)


def test_the_template_lies_beside_the_tokenizer(tiny, theirs, tmp_path):
    tiny.to_hf(tmp_path)
    assert (tmp_path / TEMPLATE_FILE).read_text() == theirs.chat_template
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


# --- the official templates, where a folder with them is given: chat templates of Llama 3.1 and 3.2, and Llama 2


@pytest.mark.parametrize("name", ["llama3.1.jinja", "llama3.2.jinja"])
def test_official_llama3_template(tiny, theirs, name):
    """`trim` writes what the official template does, but for how functions are described and where text begins."""
    path = Path(os.environ.get("PUNA_TEST_TEMPLATES", "")) / name
    if not path.is_file():
        pytest.skip(f"no {name}; set PUNA_TEST_TEMPLATES to a folder that holds it")
    official = path.read_text()
    for dialog_name, messages in DIALOGS.items():
        for builtins in [(), ("brave_search", "code_interpreter")] if name == "llama3.1.jinja" else [()]:
            style = Style(trim=True, builtins=builtins, date="26 Jul 2024")
            kwargs: dict[str, Any] = {"builtin_tools": list(builtins)} if builtins else {}
            text = theirs.apply_chat_template(
                [openai(message) for message in messages],
                chat_template=official,
                date_string="26 Jul 2024",
                add_generation_prompt=True,
                tokenize=False,
                **kwargs,
            )
            ids = [
                i
                for part in re.split(r"(<\|\w+\|>)", text)
                for i in ([tiny.special[part]] if part in tiny.special else tiny.encode(part))
            ]
            assert ids == render(tiny, messages, style).ids, dialog_name
