"""Meta's folders beside a forward written from the reference's formulas: neighbouring pairs as complex numbers."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from puna import cli
from puna.errors import CheckpointError
from puna.llama import folder as files
from puna.llama import hub, meta
from puna.llama.config import LlamaConfig, RopeScaling
from puna.llama.model import Llama
from puna.llama.tokenizer import Tokenizer

LLAMA_2 = {
    "dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1,
}  # fmt: skip
LLAMA_3 = {
    "dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 16, "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5, "vocab_size": 96, "rope_theta": 500_000.0,
}  # fmt: skip
STYLES = {
    "llama2": LLAMA_2,
    "llama3": LLAMA_3,
    "llama3.1": LLAMA_3 | {"use_scaled_rope": True},
    "llama3.2": LLAMA_3 | {"use_scaled_rope": True, "tied": True},
}
VOCAB = 96
SHARED_OUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}


def width_of_ffn(params: dict) -> int:
    width = int(2 * 4 * params["dim"] / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    return params["multiple_of"] * ((width + params["multiple_of"] - 1) // params["multiple_of"])


def random_state(params: dict, seed: int = 0) -> dict[str, Tensor]:
    """A model under Meta's names, whole; wide enough that attention is uneven."""
    draw = torch.Generator().manual_seed(seed)
    dim, ffn, head = params["dim"], width_of_ffn(params), params["dim"] // params["n_heads"]
    key = params.get("n_kv_heads", params["n_heads"]) * head
    shapes = {"tok_embeddings.weight": (VOCAB, dim), "norm.weight": (dim,), "output.weight": (VOCAB, dim)}
    for layer in range(params["n_layers"]):
        block = {
            "attention.wq": (dim, dim), "attention.wk": (key, dim), "attention.wv": (key, dim),
            "attention.wo": (dim, dim), "feed_forward.w1": (ffn, dim), "feed_forward.w2": (dim, ffn),
            "feed_forward.w3": (ffn, dim), "attention_norm": (dim,), "ffn_norm": (dim,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=draw)
        state[name] = 1 + 0.2 * values if len(shape) == 1 else values * (0.5 if "wo" in name or "w2" in name else 0.3)
    if params.get("tied"):
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def frequencies(params: dict) -> Tensor:
    head = params["dim"] // params["n_heads"]
    turns = 1.0 / (params.get("rope_theta", 10_000.0) ** (torch.arange(0, head, 2).float() / head))
    if not params.get("use_scaled_rope"):
        return turns
    factor = 32 if params.get("tied") else 8
    found = []
    for turn in turns.tolist():
        wave = 2 * torch.pi / turn
        smooth = (8_192 / wave - 1) / 3
        blend = (1 - smooth) * turn / factor + smooth * turn
        found.append(turn if wave < 8_192 / 4 else turn / factor if wave > 8_192 else blend)
    return torch.tensor(found)


def reference_logits(state: dict[str, Tensor], params: dict, tokens: Tensor) -> Tensor:
    """Pre-norm blocks, adjacent pairs turned as complex numbers, key heads repeated; tokens (L,) -> logits (L, V)."""
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    angles = torch.outer(torch.arange(len(tokens)).float(), frequencies(params))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * state[name]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    hidden = state["tok_embeddings.weight"][tokens]
    future = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)
    for layer in range(params["n_layers"]):
        w = {name: state[f"layers.{layer}.{name}.weight"] for name in (
            "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
            "feed_forward.w3",
        )}  # fmt: skip
        x = norm(hidden, f"layers.{layer}.attention_norm.weight")
        query, key, value = (
            (x @ w[f"attention.w{kind}"].T).view(len(tokens), count, -1)
            for kind, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        query, key = turned(query), turned(key).repeat_interleave(heads // kv_heads, 1)
        value = value.repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5 + future
        hidden = hidden + torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1) @ w["attention.wo"].T
        x = norm(hidden, f"layers.{layer}.ffn_norm.weight")
        hidden = hidden + (silu(x @ w["feed_forward.w1"].T) * (x @ w["feed_forward.w3"].T)) @ w["feed_forward.w2"].T
    return norm(hidden, "norm.weight") @ state["output.weight"].T


def split_dim(name: str, params: dict) -> int | None:
    if name == "tok_embeddings.weight":
        return 0 if "rope_theta" in params else 1
    return SHARED_OUT.get(name.split(".")[-2])


def write_parts(state: dict[str, Tensor], params: dict, folder: Path, num_parts: int, **extra: Tensor) -> Path:
    """The state in Meta's form, written without the code under test."""
    folder.mkdir(parents=True)
    for part in range(num_parts):
        own = {}
        for name, tensor in state.items():
            dim = split_dim(name, params)
            own[name] = tensor if dim is None else tensor.chunk(num_parts, dim)[part].clone()
        if params.get("tied"):
            own["output.weight"] = own["tok_embeddings.weight"]
        torch.save(own | extra, folder / f"consolidated.{part:02d}.pth")
    (folder / "params.json").write_text(json.dumps({key: value for key, value in params.items() if key != "tied"}))
    return folder


def read_parts(folder: Path, params: dict) -> dict[str, Tensor]:
    """The state of a folder in Meta's form, read without the code under test; as many key heads as it says."""
    parts = [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]
    whole = {}
    for name, tensor in parts[0].items():
        dim = split_dim(name, params)
        whole[name] = tensor if dim is None else torch.cat([part[name] for part in parts], dim)
    return whole


def some_tokens() -> Tensor:
    return torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(7))


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 1
    assert (ours - theirs).abs().max() < 2e-5 * theirs.std(), f"{(ours - theirs).abs().max()} apart"


def native(params: dict, tmp_path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """A random model of ours, its gains not all 1."""
    loaded = hub.load(write_parts(random_state(params, seed=3), params, tmp_path / "native", 1))
    return loaded.config, loaded.model.state_dict()


# --- in


@pytest.mark.parametrize(("style", "num_parts"), [
    ("llama2", 1), ("llama2", 2), ("llama2", 8), ("llama3", 1), ("llama3", 2), ("llama3.1", 2), ("llama3.2", 1),
    ("llama3.2", 2),
])  # fmt: skip
def test_logits_are_those_of_the_reference(tmp_path, style, num_parts):
    params = STYLES[style]
    state = random_state(params)
    loaded = hub.load(write_parts(state, params, tmp_path / "meta", num_parts, **{"rope.freqs": torch.ones(4)}))
    assert loaded.config.tie_embeddings == (style == "llama3.2")
    ours = loaded.model(some_tokens()[None])[0]
    assert_same_logits(ours, reference_logits(state, params, some_tokens()))


@pytest.mark.parametrize("mutation", ["no turn", "turned back"])
def test_the_reference_notices_another_order_of_rows(tmp_path, monkeypatch, mutation):
    state = random_state(LLAMA_3)
    folder = write_parts(state, LLAMA_3, tmp_path / "meta", 2)
    wrong = {"no turn": lambda rows, head_dim: rows, "turned back": meta.to_neighbours}
    monkeypatch.setattr(meta, "to_half_split", wrong[mutation])
    ours = hub.load(folder).model(some_tokens()[None])[0]
    with pytest.raises(AssertionError, match="apart"):
        assert_same_logits(ours, reference_logits(state, LLAMA_3, some_tokens()))


def test_more_parts_than_key_heads_as_meta_writes_them(tmp_path):
    """The 405B model in 16 parts: 8 key-value heads, each in two neighbouring parts; both counts are found."""
    state = random_state(LLAMA_3)
    head = 8
    folder = write_parts(state, LLAMA_3, tmp_path / "meta", 8)
    for part in range(8):
        own = torch.load(folder / f"consolidated.{part:02d}.pth", weights_only=True)
        for layer in range(2):
            for name in ("wk", "wv"):
                rows = state[f"layers.{layer}.attention.{name}.weight"]
                own[f"layers.{layer}.attention.{name}.weight"] = rows[part // 4 * head :][:head].clone()
        torch.save(own, folder / f"consolidated.{part:02d}.pth")
    expected = reference_logits(state, LLAMA_3, some_tokens())
    for told, kept in ((2, 2), (8, 8)):
        (folder / "params.json").write_text(json.dumps(LLAMA_3 | {"n_kv_heads": told}))
        loaded = hub.load(folder)
        assert loaded.config.num_kv_heads == kept
        assert_same_logits(loaded.model(some_tokens()[None])[0], expected)
    own = torch.load(folder / "consolidated.06.pth", weights_only=True)
    own["layers.1.attention.wv.weight"][0, 0] += 1
    torch.save(own, folder / "consolidated.06.pth")
    (folder / "params.json").write_text(json.dumps(LLAMA_3))
    words = r"layers.1.attention.wv.weight of .*06.pth differs from that of consolidated.05"
    with pytest.raises(CheckpointError, match=words):
        hub.load(folder)


def test_bfloat16_stays_and_another_dtype_is_given(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in random_state(LLAMA_3).items()}
    folder = write_parts(state, LLAMA_3, tmp_path / "meta", 2)
    half = hub.load(folder).model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.embed_tokens.weight, state["tok_embeddings.weight"])
    assert torch.equal(hub.load(folder, torch.float32).model.head, state["output.weight"].float())


def test_what_params_json_leaves_open(tmp_path):
    def config(name: str, **changes) -> LlamaConfig:
        params = STYLES[name] | changes
        return hub.load(write_parts(random_state(params), params, tmp_path / f"{name}{len(changes)}", 2)).config

    two, three, scaled, small = (config(name) for name in STYLES)
    assert (two.vocab_size, two.num_kv_heads, two.rope_theta, two.max_seq_len, two.ffn_dim) == (96, 8, 1e4, 4_096, 192)
    assert (three.num_kv_heads, three.rope_scaling, three.max_seq_len, three.ffn_dim) == (2, None, 8_192, 224)
    assert (scaled.rope_scaling, scaled.max_seq_len) == (RopeScaling(factor=8.0), 131_072)
    assert small.rope_scaling == RopeScaling(factor=32.0)
    assert config("llama3.1", rope_scaling_factor=4.0).rope_scaling == RopeScaling(factor=4.0)
    assert config("llama3", rope_theta=1e6).max_seq_len == 16_384


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 4096, 1.3, 28672), (8192, 256, 1.0, 22016),
        (4096, 1024, 1.3, 14336), (16384, 4096, 1.2, 53248), (2048, 256, 1.5, 8192), (3072, 256, 1.0, 8192),
    ],
)  # fmt: skip
def test_feed_forward_widths_of_the_published_models(dim, multiple_of, multiplier, width):
    assert meta.ffn_dim(dim, multiple_of, multiplier) == width
    keys = meta.ffn_params(dim, width)
    assert meta.ffn_dim(dim, keys["multiple_of"], keys.get("ffn_dim_multiplier")) == width


def test_any_width_of_the_feed_forward_can_be_told():
    for dim in (48, 100, 768, 3_072):
        for width in range(1, 12_000, 7):
            keys = meta.ffn_params(dim, width)
            assert meta.ffn_dim(dim, keys["multiple_of"], keys.get("ffn_dim_multiplier")) == width


def test_every_difference_of_every_part_is_named(tmp_path):
    state = random_state(LLAMA_3)
    folder = write_parts(state, LLAMA_3, tmp_path / "meta", 2)
    own = torch.load(folder / "consolidated.01.pth", weights_only=True)
    del own["norm.weight"]
    own["extra.bias"] = torch.zeros(3)
    own["layers.0.attention.wo.weight"] = torch.zeros(64, 64)
    torch.save(own, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError) as error:
        hub.load(folder)
    assert str(error.value) == (
        f"{folder} does not fit its params.json: consolidated.01.pth: unexpected extra.bias (3,); consolidated.01.pth: "
        "layers.0.attention.wo.weight is (64, 64), wanted (64, 32); consolidated.01.pth: missing norm.weight (64,). "
        "Use the params.json and all the parts of one and the same model."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": None}, "does not describe a Llama"),
        ({"n_layers": "gone"}, "params.json has no key 'n_layers'"),
        ({"n_heads": 0}, "does not describe a Llama"),
        ({"norm_eps": -1.0}, "(?s)does not describe a Llama: .*norm_eps"),
        ({"quantization_args": {}, "vision_chunk_size": 4}, "has quantization_args, vision_chunk_size, which Puna"),
        ({"n_layers": 3}, r"missing layers.2.attention.wk.weight \(8, 64\)"),
        ({"multiple_of": 500}, r"feed_forward.w1.weight is \(112, 64\), wanted \(250, 64\)"),
    ],
)
def test_a_params_json_that_is_wrong(tmp_path, changes, words):
    folder = write_parts(random_state(LLAMA_3), LLAMA_3, tmp_path / "meta", 2)
    values = {key: value for key, value in (LLAMA_3 | changes).items() if value != "gone"}
    (folder / "params.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        hub.load(folder)


def test_missing_files_are_named(tmp_path):
    folder = write_parts(random_state(LLAMA_3), LLAMA_3, tmp_path / "meta", 8)
    (folder / "consolidated.03.pth").unlink()
    with pytest.raises(CheckpointError, match=r"has no consolidated.03.pth; it holds consolidated.00.pth, "):
        hub.load(folder)
    (folder / "consolidated.07.pth").rename(folder / "consolidated.03.pth")
    with pytest.raises(CheckpointError, match=r"7 parts cannot share 8 query heads or 96 tokens or 2 key-value heads"):
        hub.load(folder)
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no params\.json"):
        hub.load(folder)


def test_a_folder_with_both_forms_is_hugging_face_s(tmp_path):
    config, state = native(LLAMA_3, tmp_path)
    hub.save(state, config, tmp_path / "both")
    for file in write_parts(random_state(LLAMA_3), LLAMA_3, tmp_path / "meta", 1).iterdir():
        shutil.copy(file, tmp_path / "both")
    assert torch.equal(hub.load(tmp_path / "both").model.head, state["lm_head.weight"])


# --- files that are not what they seem


class Runs:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_in_a_file_is_run(tmp_path):
    folder = write_parts(random_state(LLAMA_3), LLAMA_3, tmp_path / "meta", 1)
    torch.save({"norm.weight": Runs(str(tmp_path / "pwned"))}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated.00.pth holds posix.mkdir, not only tensors. Puna reads"):
        hub.load(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"\(\d+ bytes\) is cut short or not a file of"),
        (pickle.dumps({"a": 1}), "is cut short or not a file of torch.save"),
        (b"", "is cut short"),
    ],
)
def test_a_file_that_is_not_torch_s(tmp_path, content, words):
    folder = write_parts(random_state(LLAMA_3), LLAMA_3, tmp_path / "meta", 1)
    (folder / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        hub.load(folder)


def test_a_file_that_is_cut_short_or_holds_other_things(tmp_path):
    folder = write_parts(random_state(LLAMA_3), LLAMA_3, tmp_path / "meta", 1)
    file = folder / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[:-1_000])
    with pytest.raises(CheckpointError, match="is cut short"):
        hub.load(folder)
    for content, words in (([torch.ones(1)], "holds a list"), ({"step": 3}, "holds a int under 'step'")):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=words):
            hub.load(folder)


def test_parts_are_mapped_and_read_one_by_one(tmp_path, monkeypatch):
    seen, load = [], torch.load
    monkeypatch.setattr(files.torch, "load", lambda file, **how: seen.append((file.name, how)) or load(file, **how))
    hub.load(write_parts(random_state(LLAMA_3), LLAMA_3, tmp_path / "meta", 2))
    how = {"map_location": "cpu", "mmap": True, "weights_only": True}
    assert seen == [(f"consolidated.{part:02d}.pth", how) for part in (0, 1, 0, 1)]


# --- out


@pytest.mark.parametrize(("style", "num_parts"), [
    ("llama2", 1), ("llama2", 8), ("llama3", 2), ("llama3", 8), ("llama3.1", 1), ("llama3.2", 2),
])  # fmt: skip
def test_both_forms_of_a_model_load_to_identical_logits(tmp_path, style, num_parts):
    """Also with more parts (8) than key-value heads (2): Meta's form then holds each several times."""
    params = STYLES[style]
    config, state = native(params, tmp_path)
    hub.save(state, config, tmp_path / "hf")
    meta.save(state, config, tmp_path / "meta", num_parts=num_parts)
    one, other = hub.load(tmp_path / "hf"), hub.load(tmp_path / "meta")
    logits = one.model(some_tokens()[None])
    repeated = max(config.num_kv_heads, num_parts)
    assert other.config == config.model_copy(update={"num_kv_heads": repeated})
    if repeated == config.num_kv_heads:
        assert torch.equal(logits, other.model(some_tokens()[None]))
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.model.state_dict().items())
    told = json.loads((tmp_path / "meta" / "params.json").read_text())
    told["tied"] = config.tie_embeddings
    whole = read_parts(tmp_path / "meta", told)
    assert_same_logits(logits[0], reference_logits(whole, told, some_tokens()))
    assert_same_logits(other.model(some_tokens()[None])[0], logits[0])


def test_what_is_written_is_what_meta_would_write(tmp_path):
    """The same names, shapes, bytes and keys as a folder made by hand; a tied head takes no room."""
    for style, params in STYLES.items():
        state = random_state(params)
        by_hand = write_parts(state, params, tmp_path / style / "by hand", 2)
        loaded = hub.load(by_hand)
        meta.save(loaded.model.state_dict(), loaded.config, tmp_path / style / "ours", num_parts=2)
        for part in ("consolidated.00.pth", "consolidated.01.pth"):
            theirs = torch.load(by_hand / part, weights_only=True)
            ours = torch.load(tmp_path / style / "ours" / part, weights_only=True)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
            sizes = [(folder / part).stat().st_size for folder in (by_hand, tmp_path / style / "ours")]
            assert abs(sizes[0] - sizes[1]) < 4_000
        told = json.loads((tmp_path / style / "ours" / "params.json").read_text())
        assert told.keys() <= meta.KNOWN
        assert ("rope_theta" in told) == (style != "llama2")
        assert hub.load(tmp_path / style / "ours").config == loaded.config


def test_models_that_meta_s_form_cannot_hold(tmp_path):
    config, state = native(LLAMA_3, tmp_path)
    cases = [
        ({"head_dim": 16}, 1, r"model.head_dim 16 x 8 heads is not model.dim 64"),
        ({"rope_scaling": RopeScaling(low_freq_factor=2.0)}, 1, "has other bands than Llama 3.1's"),
        ({}, 3, r"this model: 3 parts cannot share 8 query heads or 224 feed-forward channels or 2 key-value heads"),
    ]
    for changes, num_parts, words in cases:
        with pytest.raises(CheckpointError, match=words):
            meta.save(state, config.model_copy(update=changes), tmp_path / "out", num_parts=num_parts)
    assert not (tmp_path / "out").exists()
    meta.save(state, config, tmp_path / "out", dtype=torch.bfloat16)
    assert hub.load(tmp_path / "out").model.head.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="is already there"):
        meta.save(state, config, tmp_path / "out")


def test_export_to_meta_and_back(tmp_path, data_dir):
    """Llama 2's own tokenizer and its vocabulary of -1 travel with the weights."""
    config = LlamaConfig(
        num_layers=1, dim=16, ffn_dim=48, num_heads=2, num_kv_heads=2, head_dim=8, vocab_size=32_000,
        rope_theta=10_000.0, max_seq_len=4_096,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(1)
    hub.save(model.state_dict(), config, tmp_path / "hf", tokenizer_dir=data_dir / "tok-llama2")
    figures = hub.export_meta(tmp_path / "hf", tmp_path / "meta", dtype="bf16", num_parts=2)
    assert (figures["num_parts"], figures["num_parameters"]) == (2, config.num_parameters)
    loaded = hub.load(tmp_path / "meta")
    assert loaded.config == config
    assert torch.equal(loaded.model.head, model.head.bfloat16())
    assert loaded.tokenizer_dir == tmp_path / "meta"
    params = json.loads((tmp_path / "meta" / "params.json").read_text()) | {"vocab_size": -1}
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    again = hub.load(tmp_path / "meta")
    own = Tokenizer.load(again.tokenizer_dir)
    assert (again.config.vocab_size, own.vocab_size, own.bos, own.eos) == (32_000, 32_000, 1, 2)
    assert own.encode("This is a test sentence.") == [910, 338, 263, 1243, 10541, 29889]


def test_the_verb_exports_to_meta(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(hub, "export_meta", lambda *given: seen.append(given) or {"num_parts": 4})
    words = ["puna", "export", "some", "--to", "meta", "--out", "o", "--parts", "4", "--dtype", "fp16", "--json"]
    for extra, status, out in (([], 0, '{"num_parts": 4}\n'), (["--check"], 2, "")):
        monkeypatch.setattr(sys, "argv", [*words, *extra])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        assert (left.value.code, told.out) == (status, out)
    assert "check a Meta folder with: puna parity OUT" in told.err
    assert seen == [(Path("some"), Path("o"), None, "fp16", 4)]
