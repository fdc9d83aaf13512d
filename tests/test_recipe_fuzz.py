"""Damaged recipes: whatever is changed in a shipped one, it loads or is refused in one sentence."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from puna import recipe
from puna.errors import RecipeError

TEXTS = [path.read_text(encoding="utf-8") for path in sorted(recipe.FOLDER.glob("*.toml"))]
KEYS = [*recipe.keys(), *recipe.sections()]
VALUES = re.findall(
    r"\S+",
    r"""
    0 1 -1 2 3 64 1e6 1e400 -0.0 0.5 nan inf -inf true false "none" none "" "auto" 'x' [] [[]] [[0, 1]] [[1, 2, 3]]
    [1,] [[1024, 2048]] [["a",1]] [["a",0.5],["b",0.5]] [["a",1],["a",2]] {} {a=1} {factor=4.0} {factor="x"} 1979-05-27
    07:32:00 1979-05-27T07:32:00Z 0xff 0o7 0b1 1_000 1__0 +5 00 .5 5. 9223372036854775807 9223372036854775808
    -9223372036854775809 99999999999999999999999999 1e308 1e-320 "\u0000" "\ud800"
    "a\nb" '''x''' 'é🦙' = # [ ] { } , "
""",
)
VALUES += ["0x" + "f" * 4000, "[" * 2000, '"' + "y" * 3000 + '"', '"cosine"', '"bf16"', '"demo"', '"tiny"', '"../x"']
LINES = [
    'extends = "demo"',
    'extends = "tiny"',
    'extends = "nowhere"',
    "extends = 3",
    'extends = ["demo"]',
    'extends = "own.toml"',
    "[model]",
    "[train]",
    "[[train]]",
    "[train.lr]",
    "[model.rope_scaling]",
    '[model."rope_scaling"]',
    "[x]",
    "[]",
    "[[]]",
    "[a.b.c.d]",
    "model = 3",
    'model.rope_scaling = "none"',
    '"train.lr" = 1',
    "'' = 1",
    "train.lr.x = 1",
    "= 3",
    "lr",
    "\x00",
    "\ufeff",
    "\r",
    '"""',
]


def change_bytes(text: str, draw: random.Random) -> str:
    data = bytearray(text.encode("utf-8", "surrogateescape"))
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        if draw.random() < 0.5:
            data[place : place + draw.randint(0, 5)] = draw.randbytes(draw.randint(0, 3))
        else:
            data[place:place] = draw.choice(b"[]{}=\"'.,#\n\\_-+e0 ").to_bytes(1, "little") * draw.randint(1, 3)
    return data.decode("utf-8", "surrogateescape")


def change_lines(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(4)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines[place], lines[other] = lines[other], lines[place]
    elif kind == 2:
        lines.insert(place, lines[other])
    else:
        lines.insert(place, draw.choice(LINES))
    return "\n".join(lines)


def change_value(text: str, draw: random.Random) -> str:
    found = list(re.finditer(r"(?<=[\w\]]) = ([^#\n]*)", text))
    if not found:
        return text
    match = draw.choice(found)
    return text[: match.start(1)] + draw.choice(VALUES) + text[match.end(1) :]


def change_key(text: str, draw: random.Random) -> str:
    found = list(re.finditer(r"^\[?([\w.]+)", text, re.MULTILINE))
    if not found:
        return text
    match = draw.choice(found)
    key = match[1]
    swapped = key[1:2] + key[:1] + key[2:]
    new = draw.choice([swapped, key * 2, key.upper(), f"{key}.x", f'"{key}"', "", draw.choice(KEYS)])
    return text[: match.start(1)] + new + text[match.end(1) :]


def add_setting(text: str, draw: random.Random) -> str:
    return f"{draw.choice(KEYS)} = {draw.choice(VALUES)}\n{text}"


def join_two(text: str, draw: random.Random) -> str:
    other = draw.choice(TEXTS)
    return text[: draw.randrange(len(text) + 1)] + other[draw.randrange(len(other)) :]


CHANGES: list[Callable[[str, random.Random], str]] = [
    change_bytes,
    change_lines,
    change_value,
    change_value,
    change_key,
    add_setting,
    join_two,
]


def check(path: Path, seed: int) -> bool:
    """Mutate a recipe and load it; whether it was valid."""
    draw = random.Random(seed)
    text = draw.choice(TEXTS)
    for _ in range(draw.randint(1, 3)):
        text = draw.choice(CHANGES)(text, draw)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        loaded = recipe.load(path)
    except RecipeError:
        return False
    path.write_text(loaded.text, encoding="utf-8")
    assert recipe.load(path).recipe == loaded.recipe
    assert recipe.table(loaded)
    return True


def fuzz(folder: Path, seeds: range) -> None:
    valid = sum(check(folder / "own.toml", seed) for seed in seeds)
    assert len(seeds) / 50 < valid < len(seeds) / 2, "mutations should spoil most recipes, not all"


def test_two_thousand_damaged_recipes(tmp_path):
    fuzz(tmp_path, range(2_000))


@pytest.mark.slow
def test_ten_thousand_more(tmp_path):
    fuzz(tmp_path, range(2_000, 14_000))


def test_damaged_flags():
    """Every setting and section with odd values."""
    draw, outcomes = random.Random(0), set()
    for key in KEYS:
        for value in draw.sample(VALUES, 8):
            try:
                recipe.load("tiny", [f"--{key}={value}"])
                outcomes.add("valid")
            except RecipeError:
                outcomes.add("refused")
    assert outcomes == {"valid", "refused"}
