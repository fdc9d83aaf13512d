"""One tokenizer over three forms of file: tiktoken ranks (Llama 3), SentencePiece (Llama 2), tokenizer.json.

Text never turns into a control id, whatever strings it holds: control ids are put in by name (`special`) only.
"""

import base64
import codecs
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.llama.template import TEMPLATE_FILE, ChatFormat, chat_template
from puna.llama.tokenizer_json import PATTERN, byte_alphabet, from_ranks, from_sentencepiece

BEGIN_OF_TEXT, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
END_OF_MESSAGE, END_OF_TURN = "<|eom_id|>", "<|eot_id|>"
PYTHON_TAG = "<|python_tag|>"
# Special tokens of Llama 3 in the order of their ids; reserved slots fill up to the number wanted (256 in Llama 3).
NAMED_SPECIALS = (
    BEGIN_OF_TEXT, END_OF_TEXT, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", START_HEADER, END_HEADER, END_OF_MESSAGE, END_OF_TURN,
    PYTHON_TAG, "<|image|>",
)  # fmt: skip
STOP_NAMES = (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN)
BOS_NAMES, EOS_NAMES = (BEGIN_OF_TEXT, "<s>", "<|endoftext|>"), (END_OF_TEXT, "</s>", "<|endoftext|>")

# Limits of the Llama 3 encoder: its regular expression works on slices, cut again inside long runs.
SLICE_CHARS, RUN_CHARS = 400_000, 25_000

_RANK_LINE = re.compile(rb"^[A-Za-z0-9+/]+=* [0-9]+\r?\n")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{RUN_CHARS + 1},}}|(?<!\S)\S{{{RUN_CHARS + 1},}}")
_FIX = "Give the tokenizer.model or tokenizer.json of a Llama, or the folder that holds it."


def special_names(num_special: int) -> list[str]:
    """Names of Llama 3's first `num_special` special tokens, in the order of their ids."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(2, max(num_special - len(NAMED_SPECIALS), 0) + 2))
    return [*NAMED_SPECIALS, *reserved][:num_special]


class _Form(ABC):
    """What differs between the three file forms: text -> ids, and the bytes that each id stands for."""

    file_name: str
    pieces: list[bytes]  # bytes of each id; empty for control ids
    special: dict[str, int]  # control tokens

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abstractmethod
    def to_json(self, bos: str) -> dict[str, Any]:
        """The content of a tokenizer.json that gives the same ids, with BOS before a text."""


class _Ranks(_Form):
    """A tiktoken rank file: one base64 token and its rank a line; 256 special tokens follow the ranks."""

    file_name = "tokenizer.model"

    def __init__(self, data: bytes) -> None:
        import tiktoken

        self.ranks: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                token, rank = line.split()
                self.ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"line {number} is not a base64 token and its rank") from error
        if sorted(self.ranks.values()) != list(range(len(self.ranks))):
            raise ValueError("the ranks are not 0, 1, 2, ... without a gap")
        if any(bytes([byte]) not in self.ranks for byte in range(256)):
            raise ValueError("some of the 256 bytes have no rank")
        self.special = {name: len(self.ranks) + i for i, name in enumerate(special_names(256))}
        self.pieces = [*sorted(self.ranks, key=self.ranks.__getitem__), *[b""] * len(self.special)]
        self._bpe = tiktoken.Encoding("puna", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special)

    def encode(self, text: str) -> list[int]:
        return [i for part in slices(text) for i in self._bpe.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [list(slices(text)) for text in texts]
        batch = iter(self._bpe.encode_ordinary_batch(list(chain.from_iterable(parts)), num_threads=_num_cores()))
        return [[i for ids in islice(batch, len(own)) for i in ids] for own in parts]

    def to_json(self, bos: str) -> dict[str, Any]:
        return from_ranks(self.ranks, self.special, bos)


class _SentencePiece(_Form):
    """A SentencePiece model; control pieces are never matched in text."""

    file_name = "tokenizer.model"

    def __init__(self, data: bytes) -> None:
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        ids = range(self.model.GetPieceSize())
        self.special = {self.model.IdToPiece(i): i for i in ids if self.model.IsControl(i)}
        self.pieces = [self._bytes(i) for i in ids]

    def _bytes(self, i: int) -> bytes:
        if self.model.IsControl(i):
            return b""
        if self.model.IsUnknown(i):
            return " ⁇ ".encode()
        piece = self.model.IdToPiece(i)
        return bytes([int(piece[3:5], 16)]) if self.model.IsByte(i) else piece.replace("▁", " ").encode()

    def encode(self, text: str) -> list[int]:
        return self.model.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.Encode(list(texts), num_threads=_num_cores())

    def to_json(self, bos: str) -> dict[str, Any]:
        return from_sentencepiece(self.model, self.special, bos)


class _Json(_Form):
    """A tokenizer.json of Hugging Face tokenizers that holds a BPE, byte-level or with byte fallback."""

    file_name = "tokenizer.json"

    def __init__(self, data: bytes) -> None:
        import tokenizers

        spec = json.loads(data)
        if not {"model", "added_tokens", "pre_tokenizer", "decoder"} <= spec.keys():
            raise ValueError("it is JSON, but not a tokenizer.json")
        kind = spec["model"].get("type", "BPE")
        if kind != "BPE":
            raise ValueError(f"its model is {kind}; Puna reads BPE")
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
        self.data = data
        self._keep_control_ids_out(spec["model"])
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._bpe.encode_special_tokens = True
        self._bpe.no_padding()
        self._bpe.no_truncation()
        literal = {token["id"] for token in spec["added_tokens"]}
        alphabet = byte_alphabet() if "ByteLevel" in json.dumps([spec["pre_tokenizer"], spec["decoder"]]) else None
        self.pieces = [b""] * (1 + max(self._bpe.get_vocab(with_added_tokens=True).values()))
        for piece, i in self._bpe.get_vocab(with_added_tokens=True).items():
            if piece not in self.special:
                self.pieces[i] = piece.encode() if i in literal else self._bytes(piece, alphabet)

    def _keep_control_ids_out(self, model: dict) -> None:
        """Drop merges that would spell a control token out of text."""
        if model.get("ignore_merges") and not self.special.keys().isdisjoint(model["vocab"]):
            raise ValueError("its control tokens are ordinary words of the vocabulary (ignore_merges)")
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if "".join(pair) not in self.special]

    @staticmethod
    def _bytes(piece: str, alphabet: dict[str, int] | None) -> bytes:
        if alphabet is not None:
            return bytes(alphabet[char] for char in piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def to_json(self, bos: str) -> dict[str, Any]:
        return json.loads(self.data)


class Tokenizer:
    """Text to ids and back.

    `bos`, `eos`: ids of the control tokens around a document; `stop_ids`: what ends generation; `special`: name -> id
    of each control token; `hash`: SHA-256 over the content that decides the ids; `chat_format`: how dialogs are
    written.
    """

    def __init__(self, form: _Form, files: dict[str, bytes]) -> None:
        self.form, self.files = form, files
        self.special = form.special
        self.vocab_size = len(form.pieces)
        self.bos = self._control("bos_token", BOS_NAMES)
        self.eos = self._control("eos_token", EOS_NAMES)
        self.stop_ids = frozenset([self.eos, *(self.special[name] for name in STOP_NAMES if name in self.special)])
        self.chat_format: ChatFormat = "llama3" if START_HEADER in self.special else "llama2"
        self.hash = hashlib.sha256(files[form.file_name] + f"{self.bos} {self.eos}".encode()).hexdigest()
        start = form.encode("a")
        self.has_prefix_space = bool(start) and form.pieces[start[0]].startswith(b" ")

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer file, or the one in a folder; its content tells the form. Raises TokenizerError."""
        file = _find(Path(path))
        try:
            form = _form(file.read_bytes())
            files = {form.file_name: file.read_bytes()}
            config = file.with_name("tokenizer_config.json")
            if isinstance(form, _Json) and config.is_file():
                files[config.name] = config.read_bytes()
            return cls(form, files)
        except ImportError:
            raise
        except Exception as error:  # three libraries raise whatever they like at a damaged file
            raise TokenizerError(f"The tokenizer file {file} cannot be used: {error}", _FIX) from error

    def _control(self, key: str, names: Sequence[str]) -> int:
        config = json.loads(self.files.get("tokenizer_config.json", b"{}"))
        named = config.get(key)
        if isinstance(named, dict):
            named = named["content"]
        for name in [named] if named else names:
            if name in self.special:
                return self.special[name]
        raise ValueError(f"it has no control token for {key} (looked for {named or ', '.join(names)})")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, every string in it taken as plain text; lone surrogates become U+FFFD."""
        return [self.bos] * bos + self.form.encode(_valid(text)) + [self.eos] * eos

    def encode_batch(self, texts: Iterable[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        batch = self.form.encode_batch([_valid(text) for text in texts])
        return [[self.bos] * bos + ids + [self.eos] * eos for ids in batch]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for, one after another; control ids stand for nothing."""
        return b"".join([self.form.pieces[i] for i in ids])

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        SentencePiece puts a space before a text; it is taken away again unless the ids are `continuing` another text.
        """
        data = self.decode_bytes(ids)
        return data[self._skip(data, continuing) :].decode("utf-8", "replace")

    def _skip(self, data: bytes, continuing: bool) -> int:
        return int(self.has_prefix_space and not continuing and data.startswith(b" "))

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's own files into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (Path(folder) / name).write_bytes(data)

    def to_hf(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template: `AutoTokenizer` then gives the same ids.

        Raises TokenizerError for a SentencePiece model that is not a plain BPE.
        """
        names = {i: name for name, i in self.special.items()}
        try:
            spec = self.form.to_json(names[self.bos])
        except ValueError as error:
            problem = f"This tokenizer cannot be written in Hugging Face form: {error}"
            raise TokenizerError(problem, "Use the tokenizer of a Llama, or one in tokenizer.json form.") from error
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": names[self.bos],
            "eos_token": names[self.eos],
            "clean_up_tokenization_spaces": False,
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1), "utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
        (Path(folder) / TEMPLATE_FILE).write_text(chat_template(self.chat_format), "utf-8")


class Detokenizer:
    """Ids to text one at a time, holding back a character until all its bytes are there.

    The texts of all `push` and the last `flush`, joined, are `tokenizer.decode(ids, continuing)`.
    """

    def __init__(self, tokenizer: Tokenizer, continuing: bool = False) -> None:
        self.tokenizer, self.continuing = tokenizer, continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """The text that this id completes; empty inside a character and for control ids."""
        data = self.tokenizer.form.pieces[i]
        skip = self.tokenizer._skip(data, self.continuing)
        self.continuing = self.continuing or bool(data)
        return self._utf8.decode(data[skip:])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def slices(text: str) -> Iterator[str]:
    """Cut a text as the Llama 3 encoder does: 400,000 characters, then runs of (non-)space of at most 25,000."""
    for start in range(0, len(text), SLICE_CHARS):
        part, cut = text[start : start + SLICE_CHARS], 0
        for run in _LONG_RUN.finditer(part):
            for end in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS):
                yield part[cut:end]
                cut = end
        yield part[cut:]


def _valid(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise TokenizerError(f"There is no tokenizer at {path}", _FIX)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    raise TokenizerError(f"The folder {path} holds neither tokenizer.json nor tokenizer.model", _FIX)


def _form(data: bytes) -> _Form:
    if not data:
        raise ValueError("it is empty")
    if data.lstrip()[:1] == b"{":
        return _Json(data)
    if _RANK_LINE.match(data):
        return _Ranks(data)
    try:
        return _SentencePiece(data)
    except RuntimeError as error:
        forms = "rank lines (tiktoken), a SentencePiece model, or tokenizer.json"
        raise ValueError(f"its form is unknown or its content damaged; known are {forms}") from error
