"""A checkpoint knows its tokenizer, special tokens, template and dtype; what loads it refuses another."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from puna.engine.load import load
from puna.errors import CheckpointError
from puna.llama import hub, identity
from puna.llama.identity import IDENTITY_FILE, refuse_other_tokenizer, verify_identity, write_identity
from puna.llama.template import TEMPLATE_FILE
from puna.llama.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An exported folder with its record."""
    root = tmp_path_factory.mktemp("identity")
    tokenizer = tiny_tokenizer(root / "own")
    tokenizer.to_hf(root / "forms")
    write_identity(root / "forms", Tokenizer.load(root / "forms"), "float32")
    model = tiny_model(tokenizer)
    hub.save(model.state_dict(), model.config, root / "model", tokenizer_dir=root / "forms")
    return root / "model"


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    load(folder, allow_mismatch=True)
    return str(error.value)


def test_the_record(made):
    kept = json.loads((made / IDENTITY_FILE).read_text())
    assert kept.keys() == {"format_version", "tokenizer", "special_tokens", "template", "dtype"}
    assert all(len(kept[key]["sha256"]) == 64 for key in kept if key != "format_version")
    assert (kept["template"]["name"], kept["dtype"]["name"]) == ("llama3", "float32")
    load(made)


def test_another_tokenizer(folder, tmp_path):
    tiny_tokenizer(tmp_path / "other", vocab_size=330).to_hf(folder)
    words = refusal(folder)
    assert words.startswith(f"{folder} was made with something else than is here now: the tokenizer (")
    assert "the special tokens (" in words
    assert "the chat template" not in words
    assert "--allow-mismatch" in words


def test_another_special_token(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["content"] = token["content"].replace("<|image|>", "<|video|>")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert "the special tokens (" in refusal(folder)


def test_another_template_file(folder):
    (folder / TEMPLATE_FILE).write_text("{{ messages }}")
    words = refusal(folder)
    assert words.startswith(
        f"{folder} was made with something else than is here now: the file {folder / TEMPLATE_FILE}"
    )


def test_a_renderer_that_has_changed(folder, monkeypatch):
    monkeypatch.setattr(identity, "chat_template", lambda chat_format: "another")
    assert "the chat template (llama3 " in refusal(folder)


def test_another_dtype(folder):
    half = hub.load(folder, torch.bfloat16)
    (folder / "model.safetensors").unlink()
    hub.write_tensors(half.model.state_dict(), folder, None, 1 << 30)
    words = refusal(folder)
    assert "the dtype (float32 " in words
    assert "bfloat16 " in words


def test_a_dtype_that_is_asked_for_is_no_mismatch(folder):
    assert load(folder, torch.bfloat16).model.head.dtype == torch.bfloat16


def test_a_folder_without_a_record_promises_nothing(folder, tmp_path):
    (folder / IDENTITY_FILE).unlink()
    tiny_tokenizer(tmp_path / "other", vocab_size=330).to_hf(folder)
    load(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"format_version": 1}', "is damaged"),
        ('{"format_version": 9, ', "is damaged"),
    ],
)
def test_a_damaged_record(folder, text, words):
    (folder / IDENTITY_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_a_record_of_a_later_puna(folder):
    kept = json.loads((folder / IDENTITY_FILE).read_text())
    (folder / IDENTITY_FILE).write_text(json.dumps(kept | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="has format version 2; this Puna reads 1"):
        load(folder)


def test_training_on_with_another_tokenizer(folder, tmp_path):
    refuse_other_tokenizer(tmp_path, tiny_tokenizer(tmp_path / "any"))
    refuse_other_tokenizer(folder, Tokenizer.load(folder))
    other = tiny_tokenizer(tmp_path / "other", vocab_size=330)
    with pytest.raises(CheckpointError, match=r"were made with another tokenizer than the data: the tokenizer \("):
        refuse_other_tokenizer(folder, other)


def test_verify_names_everything_at_once(folder, tmp_path):
    other = tiny_tokenizer(tmp_path / "other", vocab_size=330)
    with pytest.raises(CheckpointError) as error:
        verify_identity(folder, folder, other, "float16")
    assert all(name in str(error.value) for name in ("the tokenizer", "the special tokens", "the dtype"))
