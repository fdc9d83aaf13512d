"""`puna check`: what it says, in keys, and what it refuses by name; `puna train` refuses the same."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from puna import check as checking
from puna import cli, run
from puna.check import check, inspect, marked, show
from puna.errors import CheckpointError, DataError, DeviceError, RecipeError
from puna.llama.identity import IDENTITY_FILE
from puna.llama.packing import IGNORED, packed
from puna.llama.shards import ShardWriter
from puna.llama.template import TEMPLATE_FILE
from puna.recipe import Loaded, load

sys.path.append(str(Path(__file__).parent))
from tiny_llama import LINES, tiny_tokenizer


def write_shards(folder: Path, vocab_size: int = 340, repeat: int = 150) -> Path:
    tokenizer = tiny_tokenizer(folder.parent / f"tokenizer-{vocab_size}", vocab_size)
    with ShardWriter(folder, tokenizer) as writer:
        for split in ("train", "heldout"):
            for line in LINES * repeat:
                writer.add(split, tokenizer.encode(line), len(line.encode()))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("check") / "shards")


@pytest.fixture
def tiny(shards, tmp_path):
    def tiny(*overrides: str, data: Path = shards) -> Loaded:
        return load("tiny", ["--run.dir", str(tmp_path / "run"), "--data.path", str(data), *overrides])

    return tiny


def test_what_it_says(tiny, shards):
    found = check(
        tiny("--schedule.batch_stages", "[[10240, 2048]]", "--train.seq_len", "64", "--train.micro_batch", "8")
    )
    assert list(found) == [
        "run", "task", "device", "compute", "mesh", "model", "stages", "memory", "sources", "identity", "samples",
    ]  # fmt: skip
    json.dumps(found)
    assert (found["task"], found["device"], found["compute"]) == ("pretrain", "cpu", "float32")
    assert found["mesh"] == {"dp_replicate": 1, "dp_shard": 1, "pp": 1, "cp": 1, "tp": 1}
    assert found["model"] == {
        "num_parameters": tiny().recipe.model.num_parameters, "vocab_size": 512, "tokenizer_vocab_size": 340,
    }  # fmt: skip
    first, second = found["stages"]
    assert first == {
        "from_token": 0, "num_steps": 10, "batch_tokens": 1024, "seq_len": 64, "rows_per_step": 16,
        "rows_per_micro_batch": 8, "num_micro_batches": 2,
    }  # fmt: skip
    assert (second["from_token"], second["num_steps"], second["num_micro_batches"]) == (10_240, 5, 4)
    uses = [
        "parameters", "gradients", "optimizer", "average", "gathered", "exchanged", "activations", "logits", "backward",
        "update",
    ]  # fmt: skip
    assert list(found["memory"]) == [*uses, "total", "available", "fits"]
    assert found["memory"]["total"] == sum(found["memory"][use] for use in uses)
    assert found["memory"]["fits"] is True
    (source,) = found["sources"]
    assert (source["source"], source["share"], source["drawn_tokens"]) == (str(shards), 1.0, 20_480)
    assert source["epochs"] == pytest.approx(20_480 / source["num_tokens"])
    assert found["identity"].keys() == {"tokenizer", "special_tokens", "template", "dtype"}


def test_the_share_that_trains(tiny):
    """All but the first token of each document."""
    loaded = tiny("--train.seq_len", "64", "--train.micro_batch", "8")
    (source,) = check(loaded)["sources"]
    assert source["checked_rows"] == 32
    expected = 1 - source["num_documents"] / source["num_tokens"]
    assert source["trained_share"] == pytest.approx(expected, abs=0.02)


def test_samples_are_the_first_rows_with_what_trains_marked(tiny):
    found = check(tiny())["samples"]
    assert [sample["index"] for sample in found] == [0, 1, 2]
    for sample in found:
        assert sample["num_tokens"] == 128
        assert 100 < sample["num_trained"] < 128
        text = "".join(piece["text"] for piece in sample["pieces"])
        assert "<|begin_of_text|>" in text
        assert any(line.split()[0] in text for line in LINES)
        starts = [piece for piece in sample["pieces"] if "<|begin_of_text|>" in piece["text"]]
        assert all(not piece["trained"] for piece in starts)


def test_pieces(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    ids = [tokenizer.bos, *tokenizer.encode("llama"), tokenizer.eos]
    pieces = marked(tokenizer, ids, [False] + [True] * (len(ids) - 1))
    assert pieces == [
        {"text": "<|begin_of_text|>", "trained": False}, {"text": "llama<|end_of_text|>", "trained": True},
    ]  # fmt: skip


def test_two_sources(tiny, shards, tmp_path):
    other = write_shards(tmp_path / "other", repeat=10)
    found = check(tiny("--data.sources", json.dumps([[str(shards), 3], [str(other), 1]])))
    assert [source["share"] for source in found["sources"]] == [0.75, 0.25]
    assert all(source["trained_share"] > 0.8 for source in found["sources"])
    assert {sample["source"] for sample in found["samples"]} <= {str(shards), str(other)}


def test_two_processes_share_the_batch(tiny):
    found = check(tiny("--run.num_processes", "2"))
    assert found["mesh"]["dp_shard"] == 2
    assert found["stages"][0]["num_micro_batches"] == 1
    assert found["memory"]["parameters"] < 4 * found["model"]["num_parameters"]


# --- the page and the verb


def test_the_page(tiny, shards, capsys):
    found = check(tiny())
    show(found, Console(width=200))
    page = capsys.readouterr().out
    parameters = f"{found['model']['num_parameters']:,} parameters; 512 ids, of which the tokenizer has 340"
    assert "⟦<|begin_of_text|>⟧the llama" in page
    for words in (parameters, "Batches", "Data", "Memory (an estimate)", "Made with", str(shards), "Sample 2 of"):
        assert words in page
    assert "more than the" not in page
    show(found | {"memory": found["memory"] | {"fits": False}}, Console(width=200))
    assert "This is more than the" in capsys.readouterr().out


def test_text_of_the_data_is_not_markup(tiny, capsys):
    found = check(tiny())
    found["samples"][0]["pieces"] = [{"text": "[/INST] [bold]x[/] [/]", "trained": True}]
    found["samples"][0]["source"] = "a[b]c"
    show(found, Console(width=200))
    page = capsys.readouterr().out
    assert "[/INST] [bold]x[/] [/]" in page
    assert "a[b]c" in page


def test_the_verb(tiny, shards, monkeypatch, capsys):
    words = ["check", "tiny", "--data.path", str(shards), "--run.dir", "nowhere"]
    monkeypatch.setattr(sys, "argv", ["puna", *words, "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["run"] == "nowhere"
    assert not Path("nowhere").exists()
    monkeypatch.setattr(sys, "argv", ["puna", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    assert "Memory (an estimate)" in capsys.readouterr().out


# --- what is refused


def test_missing_data(tiny, tmp_path):
    with pytest.raises(DataError, match="There is no folder of token shards at"):
        check(tiny(data=tmp_path / "absent"))


def test_a_model_smaller_than_the_tokenizer(tiny, shards):
    with pytest.raises(RecipeError) as error:
        check(tiny("--model.vocab_size", "300"))
    assert str(error.value) == (
        f"model.vocab_size is 300 but the tokenizer of {shards} has 340. Set model.vocab_size to 340 or more."
    )


def test_a_tokenizer_that_was_changed(tiny, shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"<|image|>"', b'"<|imagf|>"'))
    with pytest.raises(DataError, match=f"{copy} was made with the tokenizer [0-9a-f]+, but {copy}/tokenizer holds"):
        check(tiny(data=copy))


def test_batches_that_do_not_divide(tiny):
    with pytest.raises(RecipeError, match="3 data-parallel ranks"):
        check(tiny("--run.num_processes", "3"))
    with pytest.raises(RecipeError, match="does not multiply to the 2 processes"):
        check(tiny("--run.num_processes", "2", "--mesh.dp_shard", "4"))
    with pytest.raises(RecipeError, match="3 data-parallel ranks"):
        run.train(tiny("--run.num_processes", "3"))


def test_half_precision_on_a_cpu(tiny):
    with pytest.raises(DeviceError, match=r"train\.dtype is fp16 but the device is a CPU"):
        check(tiny("--train.dtype", "fp16"))


@pytest.mark.parametrize(
    ("masked", "words"),
    [
        ([5], "row 5 of {} has no target token: it would train nothing"),
        ([4, 5, 6, 7], "batch 1 of {} (row 4, row 5, row 6, row 7) has no target token"),
        (range(32), "{} has no target token in any of the 32 rows"),
    ],
)
def test_what_does_not_train_stops_with_its_name(tiny, shards, monkeypatch, masked, words):
    """Rows of a mask that leaves nothing: `puna check` and `puna train` name the row, the batch or the source."""

    def with_mask(stream, indices, seq_len):
        batch = packed(stream, indices, seq_len)
        for place, index in enumerate(indices):
            if index in masked:
                batch.targets[place] = IGNORED
        return batch

    monkeypatch.setattr(checking, "packed", with_mask)
    for act in (check, run.train):
        with pytest.raises(DataError) as error:
            act(tiny())
        assert words.format(shards) in str(error.value)


# --- before every run


def test_prepare_records_what_the_run_is_made_with(tiny):
    loaded = tiny()
    folder = Path(loaded.recipe.run.dir)
    run.prepare(loaded, folder)
    kept = json.loads((folder / IDENTITY_FILE).read_text())
    assert kept["tokenizer"]["sha256"] == inspect(loaded.recipe).tokenizer.hash
    assert kept["dtype"]["name"] == str(torch.float32).removeprefix("torch.")
    assert "<|start_header_id|>" in (folder / "tokenizer" / TEMPLATE_FILE).read_text()


def test_a_run_goes_on_with_its_own_tokenizer_only(tiny, tmp_path):
    loaded = tiny()
    folder = Path(loaded.recipe.run.dir)
    run.prepare(loaded, folder)
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000010" / "manifest.json").write_text("{}")
    run.prepare(loaded, folder)
    other = write_shards(tmp_path / "other", vocab_size=330)
    with pytest.raises(CheckpointError, match=r"were made with another tokenizer than the data: the tokenizer \("):
        run.prepare(tiny(data=other), folder)
