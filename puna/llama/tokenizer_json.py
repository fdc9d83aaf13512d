"""The Hugging Face form of a tokenizer, tokenizer.json, made from the other forms.

A rank file and a SentencePiece BPE say in which order pieces come about, not which pairs join: every pair of pieces
whose union is a piece becomes a merge, in the order of the unions.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Piece = TypeVar("Piece", str, bytes)

# Pre-tokenizer pattern of Llama 3.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> dict[str, int]:
    """Characters that stand for the 256 bytes in a byte-level tokenizer.json (GPT-2's table): character -> byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def byte_level(
    vocab: dict[str, int], merges: Iterable[Sequence[str]], special: dict[str, int], bos: str, ignore_merges: bool
) -> dict[str, Any]:
    """A byte-level BPE with Llama 3's pattern, BOS before a text. `ignore_merges`: words of the vocabulary first."""
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _spec(
        model=_bpe(vocab, merges, ignore_merges=ignore_merges),
        special=special,
        bos=bos,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, to_bytes]},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )


def from_ranks(ranks: dict[bytes, int], special: dict[str, int], bos: str) -> dict[str, Any]:
    """The tokenizer.json of a tiktoken rank file."""
    char = {byte: char for char, byte in byte_alphabet().items()}
    show = {token: "".join(char[byte] for byte in token) for token in ranks}
    merges = [(show[left], show[right]) for left, right in _pairs(ranks)]
    return byte_level({show[token]: rank for token, rank in ranks.items()}, merges, special, bos, ignore_merges=True)


def from_sentencepiece(model: "SentencePieceProcessor", special: dict[str, int], bos: str) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece BPE with byte fallback. Raises ValueError for other models."""
    ids = range(model.GetPieceSize())
    plain = [i for i in ids if not (model.IsControl(i) or model.IsUnknown(i) or model.IsByte(i))]
    if any(model.GetScore(i) % 1 for i in plain):
        raise ValueError("its scores are not merge ranks: this SentencePiece model is no BPE")
    probe = "  ﬁ x  "
    if model.DecodeIds(model.EncodeAsIds(probe)) != probe or not any(model.IsByte(i) for i in ids):
        raise ValueError("this SentencePiece model changes its text; only byte fallback without normalisation is known")
    unknown = model.IdToPiece(model.unk_id())
    plain.sort(key=model.GetScore, reverse=True)
    order = {model.IdToPiece(i): place for place, i in enumerate(plain)}
    vocab = {model.IdToPiece(i): i for i in ids}
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return _spec(
        model=_bpe(vocab, _pairs(order), unk_token=unknown, byte_fallback=True, fuse_unk=True),
        special=special,
        bos=bos,
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, to_mark]},
        decoder={"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
    )


def _pairs(order: dict[Piece, int]) -> list[tuple[Piece, Piece]]:
    """All pairs of pieces whose union is a piece, by the place of the union, then by the places of the two."""
    found = []
    for piece, place in order.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in order and right in order:
                found.append((place, order[left], order[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _bpe(vocab: dict[str, int], merges: Iterable[Sequence[str]], **options: Any) -> dict[str, Any]:
    absent = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    off = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE", **absent, **off, **options, "vocab": vocab, "merges": [list(pair) for pair in merges]}


def _spec(model: dict[str, Any], special: dict[str, int], bos: str, **parts: Any) -> dict[str, Any]:
    one, two = ([{"SpecialToken": {"id": bos, "type_id": k}}, {"Sequence": {"id": name, "type_id": k}}]
                for k, name in enumerate("AB"))  # fmt: skip
    fixed = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **fixed} for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": one,
            "pair": one + two,
            "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
        },
        **parts,
        "model": model,
    }
