"""`puna plan` from the command line."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from matplotlib.image import imread

from puna.plan_verbs import plan


def run(*words: str) -> Result:
    return CliRunner().invoke(plan, list(words))


def told(*words: str) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)


def test_estimate_of_a_recipe_and_of_a_model() -> None:
    recipe = told("estimate", "llama3-8b", "--gpu", "h100-sxm", "--gpus", "64")
    assert recipe["low"] < recipe["seconds"] < recipe["high"]
    assert recipe["layout"]["dp"] == 64
    model = told("estimate", "--model", "llama2-7b", "--gpu", "h100-sxm", "--gpus", "64", "--tp", "2")
    assert (model["layout"]["tp"], model["layout"]["dp"]) == (2, 32)


def test_what_does_not_fit_is_told_in_words() -> None:
    result = run("estimate", "--model", "llama2-70b", "--gpu", "a100-40", "--gpus", "8", "--sharding", "zero1")
    assert "Does not fit" in result.output


def test_search_prints_the_best_and_writes_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "found.toml"
    figures = told("search", "llama3-8b", "--gpu", "h100-sxm", "--gpus", "64", "--emit", str(out))
    assert figures["best"]["layout"]["tp"] == 1
    from puna.recipe import load

    loaded = load(str(out), ()).recipe
    assert loaded.run.num_processes == 8
    assert loaded.train.micro_batch == figures["best"]["layout"]["micro_batch"]
    assert loaded.train.batch_tokens == figures["best"]["layout"]["global_batch"] * loaded.train.seq_len


def test_search_tells_the_best_in_words() -> None:
    result = run("search", "--model", "llama3-8b", "--gpu", "h100-sxm", "--gpus", "64")
    assert "best: dp 64 tp 1" in result.output
    assert "binds: " in result.output
    short = run("search", "--model", "llama3-405b", "--gpu", "rtx4090", "--gpus", "8")
    assert "Does not fit" in short.output


def test_sweep_draws_the_pictures(tmp_path: Path) -> None:
    out = tmp_path / "scaling.html"
    words = ("sweep", "--model", "llama2-7b", "--gpu", "h100-sxm", "--gpus", "8,64,512", "--batch", "512")
    figures = told(*words, "--out", str(out))
    assert [row["gpus"] for row in figures["weak"]] == [8, 64, 512]
    assert len(figures["strong"]) == len(figures["best"]) == 3
    assert out.read_text(encoding="utf-8").count("<svg") == 4
    picture = tmp_path / "scaling.png"
    assert run(*words, "--out", str(picture)).exit_code == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (640, 4 * 320)
    pixels = imread(picture)
    assert pixels.shape[:2] == (height, width)
    drawn = {tuple((255 * pixel[:3]).round().astype(int)) for row in pixels[:320] for pixel in row}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= drawn  # a line each: weak, strong, best


def test_hardware_lists_everything_with_sources() -> None:
    assert "h100-sxm" in run("hardware").output
    assert told("hardware", "gb200")["gb200"]["sources"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("estimate", "--gpu", "h100-sxm", "--gpus", "8"), "needs a recipe or --model"),
        (("estimate", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "-8"), "gpus is -8"),
        (("estimate", "--model", "llama2-7b", "--gpu", "h1000", "--gpus", "8"), "no accelerator named 'h1000'"),
        (("estimate", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "8", "--tp", "3"), "does not divide 8 GPUs"),
        (("estimate", "--model", "llama9", "--gpu", "h100", "--gpus", "8"), "no model named 'llama9'"),
        (("search", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "7"), "no layout of 7 GPUs"),
        (("search", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "0"), "gpus is 0"),
        (("search", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "9" * 30), "no layout of 9999"),
        (
            ("search", "llama2-7b", "--gpu", "h100", "--gpus", "8", "--precision", "fp8", "--emit", "no.toml"),
            "layouts of 8 GPUs is one that this package trains",
        ),
        (
            ("search", "--model", "gpt-1.3b", "--gpu", "h100", "--gpus", "8", "--emit", "no.toml"),
            "no recipe named 'gpt-1.3b'",
        ),
        (
            ("search", "llama2-7b", "--gpu", "h100", "--gpus", "8", "--emit", "/nowhere/found.toml"),
            "/nowhere/found.toml cannot be written: No such file",
        ),
        (("sweep", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "0,8"), "gpus is 0"),
        (
            ("sweep", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "8", "--out", "/nowhere/a.png"),
            "/nowhere/a.png cannot be written",
        ),
        (("validate", "/nowhere.csv"), "/nowhere.csv cannot be read: No such file"),
        (("fit", "/nowhere.csv"), "/nowhere.csv cannot be read: No such file"),
        (("hardware", "h1000"), "Did you mean h100"),
        (("sweep", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "8,many"), "'8,many' is no list of whole"),
    ],
)
def test_mistakes_are_told(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("estimate", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "8", "--tpp", "2"), "No such option '--tpp'"),
        (("estimate", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "eight"), "'eight' is not a valid integer"),
        (("estimate", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "8", "--network", "nan"), "no finite number"),
        (
            ("search", "--model", "llama2-7b", "--gpu", "h100", "--gpus", "8", "--precision", "int4"),
            "'int4' is not one",
        ),
        (("validate", "runs.csv", "--kind", "dens"), "'dens' is not one of"),
    ],
)
def test_mistyped_options_are_told(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.output


def test_validation_from_the_command_line_survives_a_bad_table(tmp_path: Path) -> None:
    path, out = tmp_path / "runs.csv", tmp_path / "out.csv"
    head = "id;stack;gpu;gpus;layers;hidden;seq_len;tp;pp;global_batch_seqs;iter_time_s;notes"
    rows = ["a-1;homegrown;H100;8;32;4096;4096;1;1;64;3,5;é", "a-2;;H100;8;32;4096;4096;1;1;64;3.5;é",
            "a-3;;TPUv9;8;32;4096;4096;1;1;64;3.5;", "a-4;;H100;8;nan;4096;4096;1;1;64;3.5;"]  # fmt: skip
    path.write_bytes("\r\n".join([head, *rows]).encode("cp1252"))
    result = run("validate", str(path), "--json", "--predictions", str(out))
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["n"], figures["skipped"]) == (1, {"broken row": 2, "unknown accelerator": 1})
    assert "left out: line 2 (a-1): iter_time_s is '3,5'" in result.stderr
    assert [line.split(",")[0] for line in out.read_text(encoding="utf-8").splitlines()] == ["id", "a-2"]
    path.write_text(head + "\n", encoding="utf-8")
    assert told("validate", str(path))["n"] == 0
    fit = run("fit", str(path))
    assert "no source" in str(fit.exception)


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from puna.plan import search, validate, fit, job, describe, fits; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
