"""`puna parity`: the three roads agree on every form of a checkpoint, and each way to be wrong is noticed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from puna import cli
from puna.errors import CheckpointError, DataError
from puna.evals import parity as parities
from puna.evals.parity import parity
from puna.llama import hub, meta, rope
from puna.llama.attention import Mask
from puna.llama.cache import DenseCache
from puna.llama.config import LlamaConfig
from puna.llama.loss import IGNORED
from puna.llama.model import Llama
from puna.llama.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_model, tiny_tokenizer  # noqa: E402

PROMPTS = ["the llama eats", "def add(a, b):\n    return", "Ñandú 🦙"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tiny model in both forms, with its tokenizer, and a file of prompts."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("parity")
    tokenizer = tiny_tokenizer(root / "tokenizer")
    model = tiny_model(tokenizer)
    tokenizer.to_hf(root / "tokenizer-hf")
    hub.save(model.state_dict(), model.config, root / "hf", tokenizer_dir=root / "tokenizer-hf")
    meta.save(model.state_dict(), model.config, root / "meta", num_parts=2, tokenizer_dir=root / "tokenizer")
    (root / "prompts.jsonl").write_text("\n".join(json.dumps(prompt) for prompt in PROMPTS) + "\n\n")
    return root


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_sound_checkpoint_passes(root, form):
    figures = parity(root / form, root / "prompts.jsonl")
    assert figures["failures"] == []
    assert (figures["passed"], figures["token_ids_identical"], figures["greedy_identical"]) == (True, True, True)
    assert figures["logprob_max_abs_diff"].keys() == {
        "train_decode", "train_transformers", "decode_transformers", "loss"
    }  # fmt: skip
    assert 0 < max(figures["logprob_max_abs_diff"].values()) < 1e-4
    tokenizer = Tokenizer.load(root / "tokenizer")
    lengths = [len(tokenizer.encode(prompt, bos=True)) for prompt in PROMPTS]
    assert sum(lengths) - 3 < figures["num_tokens"] <= sum(lengths) - 3 + 3 * parities.NEW_TOKENS
    assert (figures["num_prompts"], figures["dtype"], figures["tolerance"]) == (3, "fp32", 5e-4)


def test_sixteen_bits_have_their_own_tolerance(root):
    figures = parity(root / "hf", root / "prompts.jsonl", "bf16")
    assert figures["tolerance"] == 0.4
    assert 1e-4 < max(figures["logprob_max_abs_diff"].values()) < 0.4
    assert figures["passed"] == (not figures["failures"])


def test_built_in_prompts(root):
    assert parities.read_prompts(root / "prompts.jsonl") == PROMPTS
    assert len(set(parities.PROMPTS)) == 8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "vocab_size", "theta"), [("tok-llama2", 32_000, 1e4), ("tok-llama3", 128_256, 5e5)])
def test_meta_folders_with_the_official_tokenizers(tmp_path, data_dir, name, vocab_size, theta):
    config = LlamaConfig(
        num_layers=1, dim=32, ffn_dim=64, num_heads=2, num_kv_heads=2, head_dim=16, vocab_size=vocab_size,
        rope_theta=theta,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(1)
    meta.save(model.state_dict(), config, tmp_path / "meta", num_parts=2, tokenizer_dir=data_dir / name)
    assert parity(tmp_path / "meta")["failures"] == []


# --- what is wrong is noticed


def failures(root: Path) -> str:
    figures = parity(root / "hf", root / "prompts.jsonl")
    assert figures["passed"] == (figures["failures"] == [])
    return "\n".join(figures["failures"])


def test_a_decode_path_of_its_own(root, monkeypatch):
    """A cache that forgets the first key."""
    attend = DenseCache.attend

    def forgetful(self, positions, mask):
        inner = attend(self, positions, mask)
        self.keys[:, :, 0] = 0
        return inner

    monkeypatch.setattr(DenseCache, "attend", forgetful)
    told = failures(root)
    assert "train and decode: log-probabilities differ by up to" in told
    assert "decode and transformers" in told
    assert "train and transformers" not in told


def test_a_training_path_of_its_own(root, monkeypatch):
    """Documents of a row that see one another."""
    monkeypatch.setattr(parities, "Mask", lambda documents: Mask())
    told = failures(root)
    assert "train and transformers" in told
    assert "decode and transformers" not in told


def test_a_loss_of_its_own(root, monkeypatch):
    """The loss over a whole pack leaves a token out."""
    whole = parities.Llama.forward

    def short(self, tokens=None, targets=None, **others):
        if targets is not None:
            targets = targets.clone()
            targets[:, 0] = IGNORED
        return whole(self, tokens, targets, **others)

    monkeypatch.setattr(parities.Llama, "forward", short)
    assert failures(root).startswith("loss: ")


def test_a_model_of_its_own(root, monkeypatch):
    """Both of our roads differ from transformers'."""
    frequencies = rope.inverse_frequencies
    monkeypatch.setattr(rope, "inverse_frequencies", lambda *words: frequencies(*words) * 1.01)
    told = failures(root)
    assert "train and transformers" in told
    assert "decode and transformers" in told
    assert "train and decode" not in told


def test_a_tokenizer_of_its_own(root, monkeypatch):
    encode = Tokenizer.encode

    def other(self, text, **ends):
        return encode(self, text.replace("llama", "Llama"), **ends)

    monkeypatch.setattr(Tokenizer, "encode", other)
    assert "prompt 1: token ids of transformers differ: 'the llama eats'" in failures(root)


def test_another_continuation(root, monkeypatch):
    monkeypatch.setattr(parities.Peer, "greedy", lambda self, *words: [1])
    told = failures(root)
    assert "prompt 2: greedy continuation of transformers differ" in told
    assert parity(root / "hf", root / "prompts.jsonl", "bf16")["greedy_identical"] is False


def test_a_number_that_is_none_is_a_failure():
    assert list(parities.too_wide({"train_decode": float("nan")}, 1.0)) == [
        "train and decode: log-probabilities differ by up to nan nats, allowed 1"
    ]


def test_rows_are_packed_up_to_the_context():
    rows = [[0] * length for length in (3, 4, 5, 20, 1)]
    assert [[len(row) for row in pack] for pack in parities.packs(rows, 8)] == [[3, 4], [5], [20], [1]]


def test_ids_that_only_the_model_has_are_never_drawn():
    def model(tokens, **others):
        scores = torch.tensor([0.0, 1.0, 3.0, 2.0, 9.0])
        return SimpleNamespace(logits=scores.expand(1, tokens.shape[1], 5), past_key_values="kept")

    model.device = torch.device("cpu")
    assert parities.Peer(model, None).greedy([1, 2], num_ids=4, stop_ids={2}) == [2]
    assert parities.Peer(model, None).greedy([1, 2], num_ids=4, stop_ids={3}) == [2] * parities.NEW_TOKENS


# --- what is given


def test_prompts_that_cannot_be_read(tmp_path):
    cases = {
        "absent.txt": (None, "There is no file .*absent.txt. Give a text file"),
        "empty.txt": (b" \n\n", "empty.txt holds no prompt"),
        "latin.txt": ("é".encode("latin-1"), "latin.txt is not UTF-8"),
        "lines.jsonl": (b'"good"\n{"a": 1}\n', "lines.jsonl, line 2 is not a JSON string"),
        "broken.jsonl": (b"\n'x'\n", "broken.jsonl, line 2 is not a JSON string"),
    }
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            parities.read_prompts(tmp_path / name)
    (tmp_path / "plain.txt").write_bytes(b"  one\r\n\n two \n")
    assert parities.read_prompts(tmp_path / "plain.txt") == ["  one", " two "]


def test_a_prompt_that_is_too_long_is_named(root, tmp_path):
    (tmp_path / "long.txt").write_text("the\n" + "the llama " * 35)
    words = r"prompt 2 has \d+ tokens; with 32 new ones it exceeds the model's context of 96"
    with pytest.raises(DataError, match=words):
        parity(root / "hf", tmp_path / "long.txt")


def test_a_folder_without_tokenizer(root, tmp_path):
    loaded = hub.load(root / "hf")
    hub.save(loaded.model.state_dict(), loaded.config, tmp_path / "bare")
    with pytest.raises(CheckpointError, match="bare holds no tokenizer"):
        parity(tmp_path / "bare")


def test_a_folder_that_transformers_cannot_read(root, monkeypatch):
    def fail(*words, **options):
        raise ValueError("no tokenizer_class\nand more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    words = r"transformers cannot load .*hf: no tokenizer_class. .* puna export CKPT --to hf"
    with pytest.raises(CheckpointError, match=words):
        parity(root / "hf", root / "prompts.jsonl")


@pytest.mark.parametrize("passed", [True, False])
def test_exit_code_and_json(monkeypatch, capsys, passed):
    seen = []
    figures = {"passed": passed, "logprob_max_abs_diff": {"train_decode": 1e-6}, "failures": []}
    monkeypatch.setattr(parities, "parity", lambda *given: seen.append(given) or figures)
    monkeypatch.setattr(sys, "argv", ["puna", "parity", "some", "--prompts", "p.txt", "--dtype", "bf16", "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == (0 if passed else 1)
    assert seen == [(Path("some"), Path("p.txt"), "bf16", None)]
    assert json.loads(capsys.readouterr().out) == figures
