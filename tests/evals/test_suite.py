import json
import shutil
from copy import deepcopy

import pytest
import torch

from puna.errors import CheckpointError, DataError
from puna.evals import suite
from puna.evals.bits import bits_per_byte, text
from puna.evals.compressors import gzip_bits_per_byte, xz_bits_per_byte
from puna.evals.ngram import NGram
from puna.evals.suite import cached_baselines, content_hash, evaluate, flat, trained_context
from puna.llama import hub
from puna.llama.config import LlamaConfig
from puna.llama.model import Llama
from puna.llama.shards import Shards, ShardWriter
from puna.llama.tokenizer import Tokenizer
from puna.train import checkpoint
from puna.train.metrics import read_events
from puna.train.task import Cursor, Tensors, module_tensors


@pytest.fixture
def shards_copy(shards_dir, tmp_path):
    """Shards of this test's own."""
    return shutil.copytree(shards_dir, tmp_path / "shards")


@pytest.fixture(scope="module")
def model(shards_dir):
    config = LlamaConfig(
        num_layers=1, dim=16, ffn_dim=24, num_heads=1, num_kv_heads=1, head_dim=16, max_seq_len=32,
        vocab_size=Shards(shards_dir, "heldout").vocab_size,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(3)
    return model


@pytest.fixture
def hf(model, shards_dir, tmp_path):
    """A Hugging Face folder with the shards' tokenizer."""
    hub.save(model.state_dict(), model.config, tmp_path / "hf", tokenizer_dir=shards_dir / "tokenizer")
    return tmp_path / "hf"


def test_a_hugging_face_folder_with_baselines_and_protocol(model, hf, shards_copy, kit):
    got = evaluate(hf, data=shards_copy)
    heldout = Shards(shards_copy, "heldout")
    want = bits_per_byte(model, heldout, context=32, stride=16, progress=False)
    assert got["bits_per_byte"] == pytest.approx(want["bits_per_byte"], rel=1e-6)
    assert got["num_tokens"] == want["num_tokens"]
    assert got["num_bytes"] == sum(len(document.encode()) for document in kit.heldout)
    assert got["gzip_bits_per_byte"] == gzip_bits_per_byte("".join(kit.heldout).encode())
    assert got["xz_bits_per_byte"] == xz_bits_per_byte("".join(kit.heldout).encode())
    assert 0 < got["ngram_bits_per_byte"] < 8
    assert got["step"] is None
    assert got["seconds"] > 0
    card = got["protocol"]
    assert (card["context"], card["stride"], card["split"], card["dtype"]) == (32, 16, "heldout", "float32")
    assert card["tokenizer_hash"] == heldout.tokenizer_hash
    assert (card["bos"], card["eos"]) == (heldout.bos, heldout.eos)
    assert card["shards_hash"] == content_hash(shards_copy)
    json.dumps(got)
    assert not (hf / "events.jsonl").exists()


def test_the_caller_chooses_windows_and_leaves_baselines_out(hf, shards_copy):
    got = evaluate(hf, data=shards_copy, baselines=False, context=8, stride=8)
    assert (got["protocol"]["context"], got["protocol"]["stride"]) == (8, 8)
    assert "gzip_bits_per_byte" not in got
    assert not (shards_copy / suite.BASELINES).exists()


@pytest.fixture
def run(model, shards_copy, tmp_path):
    """A run directory with the checkpoints of steps 2 and 10; the later one is much worse."""
    run = tmp_path / "run"
    other = deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    for step, module in ((2, model), (10, other)):
        state = {"model": Tensors(lambda module=module: module_tensors(module))}
        checkpoint.save(run, state, Cursor(step, step * 100), keep=5)
    settings = {"data.path": str(shards_copy), "train.seq_len": 12, "schedule.seq_stages": [[100, 24]]}
    (run / "model.json").write_text(model.config.model_dump_json())
    shutil.copytree(shards_copy / "tokenizer", run / "tokenizer")
    (run / "recipe.json").write_text(json.dumps({k: {"value": v, "layer": "flag"} for k, v in settings.items()}))
    return run


def test_a_run_directory(run, model, shards_copy):
    """Data, context and checkpoint come from the run, and the figures go into its events."""
    newest, first = evaluate(run), evaluate(run, step=2, baselines=False)
    assert (newest["step"], first["step"]) == (10, 2)
    assert newest["bits_per_byte"] > 1.2 * first["bits_per_byte"]
    heldout = Shards(shards_copy, "heldout")
    want = bits_per_byte(model, heldout, context=24, stride=12, progress=False)["bits_per_byte"]
    assert first["bits_per_byte"] == pytest.approx(want, rel=1e-6)
    assert (newest["protocol"]["context"], newest["protocol"]["stride"]) == (24, 12)
    events = read_events(run)
    assert [(e["event"], e["step"], e["bits_per_byte"]) for e in events] == [
        ("eval", 10, newest["bits_per_byte"]),
        ("eval", 2, first["bits_per_byte"]),
    ]
    assert events[0]["gzip_bits_per_byte"] == newest["gzip_bits_per_byte"]
    assert all(event["split"] == "heldout" and event["time"] > 0 for event in events)


def test_a_checkpoint_that_is_not_there_is_told(run):
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 7. Steps that are there: 2, 10"):
        evaluate(run, step=7)


def test_a_hugging_face_folder_needs_data(hf):
    with pytest.raises(DataError, match=r"is not a run directory, so it names no data. Give token shards with --data"):
        evaluate(hf)


def test_a_hugging_face_folder_has_no_steps(hf, shards_copy):
    with pytest.raises(CheckpointError, match=r"is not a run directory, so it has no steps"):
        evaluate(hf, data=shards_copy, step=3)


def test_another_tokenizer_is_refused(hf, shards_copy, kit):
    kit.write_tokenizer(hf / "tokenizer.json", 270)
    with pytest.raises(CheckpointError, match=r"which gives other ids. Make shards with its own tokenizer") as error:
        evaluate(hf, data=shards_copy)
    assert Tokenizer.load(hf).hash[:12] in str(error.value)
    assert Shards(shards_copy, "heldout").tokenizer_hash[:12] in str(error.value)


def test_the_same_size_of_vocabulary_is_not_enough(hf, shards_copy):
    """Two tokens change places: every count agrees and the text still decodes, but the ids mean something else."""
    spec = json.loads((hf / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    used = set(Shards(shards_copy, "heldout").document(2)[1:-1].tolist())
    first, second = [name for name, i in vocab.items() if i in used][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (hf / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match=r"which gives other ids"):
        evaluate(hf, data=shards_copy)


def test_another_file_form_of_the_same_tokenizer_is_taken(hf, shards_copy):
    spec = json.loads((hf / "tokenizer.json").read_text())
    (hf / "tokenizer.json").write_text(json.dumps(spec, indent=3))
    assert Tokenizer.load(hf).hash != Shards(shards_copy, "heldout").tokenizer_hash
    assert evaluate(hf, data=shards_copy, baselines=False)["bits_per_byte"] > 0


def test_a_checkpoint_without_tokenizer_is_refused(model, shards_copy, tmp_path):
    hub.save(model.state_dict(), model.config, tmp_path / "bare")
    with pytest.raises(
        CheckpointError, match=r"came without a tokenizer.*Put its tokenizer.json or tokenizer.model into"
    ):
        evaluate(tmp_path / "bare", data=shards_copy)


def test_a_run_without_checkpoint_is_told(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has no complete checkpoint"):
        evaluate(run)
    assert not (run / "events.jsonl").exists()


def test_baselines_are_kept_under_the_hash_of_the_data(shards_copy, monkeypatch, capsys):
    first = cached_baselines(shards_copy)
    key = content_hash(shards_copy)
    assert json.loads((shards_copy / suite.BASELINES).read_text()) == {key: first}
    monkeypatch.setattr(suite, "measure_baselines", lambda folder: pytest.fail("measured again"))
    assert cached_baselines(shards_copy) == first
    assert key[:12] in capsys.readouterr().err


def test_other_data_is_measured_anew(shards_copy, kit):
    old = cached_baselines(shards_copy)
    tokenizer = Tokenizer.load(shards_copy / "tokenizer")
    with ShardWriter(shards_copy, tokenizer) as writer:
        for split, texts in (("train", kit.train), ("heldout", kit.train[:1])):
            for document in texts:
                writer.add(split, tokenizer.encode(document), len(document.encode()))
    assert cached_baselines(shards_copy) != old


def test_a_folder_that_cannot_be_written_is_no_obstacle(shards_copy, monkeypatch, capsys):
    def refuse(path, data):
        raise OSError("Read-only file system")

    monkeypatch.setattr(suite, "write_atomic", refuse)
    assert cached_baselines(shards_copy)["gzip_bits_per_byte"] > 0
    assert "not kept: Read-only file system" in capsys.readouterr().err


def test_the_ngram_model_sees_the_train_split_only(shards_copy, kit, monkeypatch):
    seen = []

    class Spy(NGram):
        def __init__(self, tokens, offsets, *rest):
            seen.append((tokens, offsets))
            super().__init__(tokens, offsets, *rest)

    monkeypatch.setattr(suite, "NGram", Spy)
    suite.measure_baselines(shards_copy)
    ((tokens, offsets),) = seen
    train = Shards(shards_copy, "train")
    assert len(tokens) == train.num_tokens
    assert offsets.tolist() == [0, *train.lengths.cumsum()]
    decoded = Tokenizer.load(train.tokenizer_dir).decode(tokens.tolist())
    assert decoded == text(train).decode() == "".join(kit.train)


@pytest.mark.parametrize(("limit", "count"), [(None, 6), (1, 1), (10**9, 6)])
def test_flat_takes_whole_documents(shards_dir, limit, count):
    train = Shards(shards_dir, "train")
    tokens, offsets = flat(train, limit)
    assert len(offsets) == count + 1
    assert len(tokens) == offsets[-1] == train.lengths[:count].sum()


def test_trained_context_is_the_longest_stage():
    assert trained_context({"train.seq_len": 64, "schedule.seq_stages": []}) == 64
    assert trained_context({"train.seq_len": 64, "schedule.seq_stages": [[0, 32], [9, 128]]}) == 128
