"""The commands on real files, in the order of the quickstart, and what they say when something is missing or taken."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puna import cli
from puna.train.checkpoint import hold_lock

ROOT = Path(__file__).parents[1]
TRAIN = ["train", "tiny", "--run.dir", "run", "--data.path", "shards", "--model.vocab_size", "768"]


def puna(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "puna.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def figures(folder: Path, *words: str) -> dict:
    done = puna(folder, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus of this package's own source, a tokenizer, token shards and a trained tiny model."""
    folder = tmp_path_factory.mktemp("walk")
    built = figures(folder, "corpus", "build", "--source", str(ROOT / "puna"), "--out", "corpus", "--heldout", "0.1")
    assert built["splits"]["heldout"]["documents"] > 0
    made = figures(folder, "corpus", "tokenizer", "corpus", "--vocab-size", "768", "--out", "tokenizer.json")
    assert made["vocab_size"] == 768
    figures(folder, "corpus", "tokenize", "corpus", "--tokenizer", "tokenizer.json", "--out", "shards")
    trained = figures(folder, *TRAIN)
    assert (trained["steps"], trained["tokens"], trained["resumed_from"]) == (20, 20_480, None)
    return folder


@pytest.fixture(scope="module")
def exported(folder) -> Path:
    """The trained model as a Hugging Face folder, compared with transformers."""
    assert figures(folder, "export", "run", "--to", "hf", "--out", "hf", "--check")["hf_greedy_identical"] is True
    return folder / "hf"


@pytest.fixture
def fails(folder, monkeypatch, capsys):
    """Runs one command in this process and returns the one sentence it ends with."""

    def run(*words: str, status: int = 2) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["puna", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert (left.value.code, out, last[:7]) == (status, "", "error: ")
        assert "Traceback" not in err
        return last[7:]

    return run


def test_run_directory(folder):
    names = {path.name for path in (folder / "run").iterdir()}
    assert {"recipe.toml", "recipe.json", "model.json", "versions.json", "events.jsonl", "tokenizer"} <= names
    assert json.loads((folder / "run" / "recipe.json").read_text())["model.vocab_size"] == {
        "value": 768,
        "layer": "flag",
    }


def test_training_again_resumes_where_the_run_stands(folder):
    shutil.copytree(folder / "run", folder / "again")
    again = figures(folder, "train", "again", "--run.dir", "again")
    assert (again["steps"], again["resumed_from"]) == (20, 20)


def test_eval_and_generate(folder, exported):
    scored = figures(folder, "eval", "run")
    keys = ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte", "ngram_bits_per_byte")
    assert all(0 < scored[key] < 8 for key in keys)
    words = ["--prompt", "import os", "--max-tokens", "8", "--temperature", "0"]
    texts = [puna(folder, "generate", path, *words) for path in ("run", "hf")]
    assert texts[0].returncode == 0
    assert texts[0].stdout == texts[1].stdout
    assert texts[0].stderr == ""


def test_report(folder):
    done = puna(folder, "report", "run")
    assert done.stdout == "run/report.html\n"
    assert (folder / "run" / "report.html").read_text().startswith("<!doctype html>")


# --- what is wrong, and the fix


def test_missing_shards(fails):
    words = fails("train", "tiny", "--data.path", "nowhere")
    assert words.startswith("There is no folder of token shards at nowhere. Make it with `puna corpus tokenize")


def test_model_smaller_than_the_tokenizer(folder):
    done = puna(folder, "train", "tiny", "--run.dir", "small", "--data.path", "shards")
    assert done.returncode == 2
    assert "model.vocab_size is 512 but the tokenizer of shards has 768. Set model.vocab_size to 768" in done.stderr


def test_missing_tokenizer(fails, folder, exported):
    shutil.copytree(exported, folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert fails("generate", "bare", "--prompt", "x").startswith("bare holds no tokenizer. Put its tokenizer.json")


def test_missing_tokenizer_file(fails):
    assert "nowhere.json" in fails("corpus", "tokenize", "corpus", "--tokenizer", "nowhere.json", "--out", "other")


def test_checkpoint_of_a_step_that_is_not_there(fails):
    for words in (["eval", "run"], ["export", "run", "--out", "other"]):
        assert fails(*words, "--step", "999").endswith("of step 999. Steps that are there: 10, 20.")


def test_folder_without_a_model(fails):
    assert "corpus" in fails("export", "corpus", "--out", "other")


def test_export_over_files(fails):
    assert fails("export", "run", "--out", "corpus").startswith("corpus is already there. Choose a new folder")


def test_run_directory_in_use(fails, folder):
    with hold_lock(folder / "run"):
        assert "run" in fails(*TRAIN, status=3)


def test_run_directory_of_another_recipe(fails):
    words = fails(*TRAIN, "--train.lr", "1")
    assert words.startswith(
        "run holds a run of another recipe: train.lr is 0.003 there, 1.0 here. Give the same values"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_but_absent(fails):
    words = fails(*TRAIN, "--run.dir", "other", "--run.device", "cuda")
    assert words.startswith("CUDA device 0 was asked for but this machine shows 0. Set run.device to cpu")


def test_busy_port(fails):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = fails("serve", "run", "--port", str(port))
    assert words.startswith(f"Port {port} of 127.0.0.1 is in use. Choose another")


def test_prompt_longer_than_the_context(fails):
    assert "this model's context is 256 tokens" in fails("generate", "run", "--prompt", "x", "--max-tokens", "5000")
