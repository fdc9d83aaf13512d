"""Ids equal those of tiktoken, sentencepiece and transformers on real lines in hundreds of languages, and on code."""

import html
import random
import re
import tarfile
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from puna.llama.tokenizer import Tokenizer
from puna.llama.tokenizer_json import PATTERN

ODD = ["", " ", "  \n\t x", "a\x00b", "\u200d\ufe0f👩‍👩‍👧", "ﬁ Å Å", "\r\n\r\n a", "١٢٣٤ 12345", "'S 'LL 'll"]
RUNS = [char * n for char in (" ", "\n", "\t", "-", "=", "=-", "a", "0", "ab") for n in range(1, 80, 3)]


@pytest.fixture(scope="module")
def lines(data_dir) -> list[str]:
    """Two lines of each of some 530 declarations of human rights, code of this Python, runs and odd cases."""
    found = []
    with tarfile.open(data_dir / "text-udhr" / "udhr-declarations-html.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                text = html.unescape(re.sub(r"<[^>]+>", "", file.read().decode()))
                found += [line for line in text.split("\n") if len(line.strip()) > 20][4:6]
    assert len(found) > 1_000
    return found + Path(random.__file__).read_text().split("\n") + ODD + RUNS


def test_llama3_is_tiktoken(data_dir, lines):
    path = data_dir / "tok-llama3" / "tokenizer.model"
    theirs = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={})
    expected = [theirs.encode_ordinary(line) for line in lines]
    ours = Tokenizer.load(path)
    assert [ours.encode(line) for line in lines] == expected
    assert ours.encode_batch(lines) == expected
    assert [ours.decode(ids) for ids in expected] == lines


def test_llama2_is_sentencepiece(data_dir, lines):
    path = data_dir / "tok-llama2" / "tokenizer.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    expected = [theirs.encode(line) for line in lines]
    ours = Tokenizer.load(path)
    assert [ours.encode(line) for line in lines] == expected
    assert ours.encode_batch(lines) == expected
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]


@pytest.mark.parametrize("name", [pytest.param("tok-llama3", marks=pytest.mark.slow), "tok-llama2"])
def test_hugging_face_form_gives_the_same_ids(data_dir, lines, tmp_path, name):
    """Loaded by transformers (beside the config.json of a Llama) and by ourselves."""
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(data_dir / name)
    ours.to_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    expected = ours.encode_batch(lines)
    assert again.encode_batch(lines) == expected
    assert theirs(lines).input_ids == [[ours.bos, *ids] for ids in expected]
    assert theirs.batch_decode(expected) == [ours.decode(ids) for ids in expected]
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos, ours.eos, ours.vocab_size)
    assert (again.bos, again.eos, again.stop_ids, again.special) == (ours.bos, ours.eos, ours.stop_ids, ours.special)
    assert theirs.convert_tokens_to_ids(list(ours.special)) == list(ours.special.values())
