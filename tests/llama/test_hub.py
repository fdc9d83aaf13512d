import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.errors import CheckpointError
from puna.llama import hub
from puna.llama.config import LlamaConfig, RopeScaling
from puna.llama.model import Llama

CONFIG = LlamaConfig(
    num_layers=2, dim=32, ffn_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=61, rope_scaling=RopeScaling()
)


@pytest.fixture(scope="module")
def state():
    model = Llama(CONFIG)
    model.init_weights(1)
    return model.state_dict()


@pytest.fixture
def folder(tmp_path, state):
    hub.save(state, CONFIG, tmp_path / "model")
    return tmp_path / "model"


def rewrite(file, **changes):
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 9_000], ids=["one file", "shards"])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, state, max_shard_bytes):
    hub.save(state, CONFIG, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (max_shard_bytes > 9_000)
    model, config, tokenizer_dir = hub.load(tmp_path / "model")
    assert config == CONFIG
    assert tokenizer_dir is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_shard_exceeds_the_limit_only_with_a_single_tensor(tmp_path, state):
    hub.save(state, CONFIG, tmp_path / "model", max_shard_bytes=9_000)
    index = json.loads((tmp_path / "model" / hub.INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * CONFIG.num_parameters
    assert index["weight_map"].keys() == state.keys()
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "model" / name)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 9_000


def test_dtype_of_the_file_and_of_the_model(tmp_path, state):
    hub.save(state, CONFIG, tmp_path / "model", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert hub.load(tmp_path / "model").model.lm_head.weight.dtype == torch.bfloat16
    wide = hub.load(tmp_path / "model", torch.float32).model.lm_head.weight
    assert torch.equal(wide, state["lm_head.weight"].bfloat16().float())


def test_tokenizer_files_and_token_ids_travel_along(tmp_path, state):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_text("{}")
    hub.save(state, CONFIG, tmp_path / "model", tokenizer_dir=tokenizer, bos=5, eos=[6, 7])
    assert (tmp_path / "model" / "tokenizer_config.json").is_file()
    assert hub.load(tmp_path / "model").tokenizer_dir == tmp_path / "model"
    wanted = {"bos_token_id": 5, "eos_token_id": [6, 7]}
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == wanted


def test_keys_of_older_transformers_are_read(folder):
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"], values["head_dim"], values["tie_word_embeddings"]
    assert hub.config_from_hf(values, "config.json") == CONFIG
    del values["rope_scaling"], values["num_key_value_heads"], values["rope_theta"]
    old = hub.config_from_hf(values, "config.json")
    assert (old.rope_scaling, old.rope_theta, old.num_kv_heads) == (None, 10_000.0, 4)


def test_inverse_frequencies_stored_by_old_folders_are_passed_over(folder, state):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state | extra, folder / "model.safetensors")
    assert hub.load(folder).model.state_dict().keys() == state.keys()


def test_every_mismatch_is_named(folder, state):
    changed = dict(state)
    del changed["model.norm.weight"], changed["model.layers.1.mlp.up_proj.weight"]
    changed["extra.bias"] = torch.zeros(3)
    changed["lm_head.weight"] = torch.zeros(60, 32)
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        hub.load(folder)
    assert str(error.value) == (
        f"{folder} does not fit its model configuration: missing model.layers.1.mlp.up_proj.weight (48, 32); "
        "missing model.norm.weight (32,); unexpected extra.bias (3,); lm_head.weight is (60, 32), wanted (61, 32). "
        "Use the configuration and the weights of one and the same model."
    )


def test_a_state_that_does_not_fit_is_not_written(tmp_path, state):
    with pytest.raises(CheckpointError, match=r"the state dict does not fit .* lm_head.weight is \(61, 32\), wanted"):
        hub.save(state, CONFIG.model_copy(update={"vocab_size": 64}), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_overwritten(folder, state):
    with pytest.raises(CheckpointError, match=r"is already there\. Choose a new folder"):
        hub.save(state, CONFIG, folder)


def test_a_missing_folder_and_missing_files_say_what_is_there(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder. Give a complete Hugging Face folder"):
        hub.load(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors; it holds config.json, gen"):
        hub.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json; it holds generation_config.json"):
        hub.load(folder)


def test_a_missing_shard_is_named(tmp_path, state):
    hub.save(state, CONFIG, tmp_path / "model", max_shard_bytes=20_000)
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="has no model-00002-of-"):
        hub.load(tmp_path / "model")


def test_damaged_files_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: .* Fetch or export the file again"):
        hub.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        hub.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', a Llama text model has 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, 'rope_type "yarn" is not known'),
        ({"hidden_size": "gone"}, "has no key 'hidden_size'"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_configurations_of_other_models_are_refused(folder, changes, words):
    rewrite(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        hub.load(folder)


# --- torch files and indexes


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_torch_files_of_older_folders_are_read(folder, state, sharded):
    (folder / "model.safetensors").unlink()
    if sharded:
        names = list(state)
        places = {name: f"pytorch_model-{at % 2}.bin" for at, name in enumerate(names)}
        for file in set(places.values()):
            torch.save({name: state[name] for name in names if places[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        torch.save(state | derived, folder / "pytorch_model.bin")
    model = hub.load(folder).model
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert hub.load(folder, torch.bfloat16).model.head.dtype == torch.bfloat16


def test_safetensors_are_preferred_to_torch_files(folder, state):
    torch.save({name: tensor + 1 for name, tensor in state.items()}, folder / "pytorch_model.bin")
    assert torch.equal(hub.load(folder).model.head, state["lm_head.weight"])


def test_a_torch_file_that_would_run_code_is_refused(folder, state, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Runs(str(tmp_path / "pwned"))}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin holds posix.mkdir, not only tensors"):
        hub.load(folder)
    assert not (tmp_path / "pwned").exists()


class Runs:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"lm_head.weight": "../model.safetensors"}}, "names ../model.safetensors, which is not"),
        ({"weight_map": {"lm_head.weight": "/etc/passwd"}}, "names /etc/passwd, which is not a file of its own folder"),
        ({"weight_map": {"lm_head.weight": 3}}, "has no weight_map from tensors to files"),
        ({"metadata": {}}, "index.json has no weight_map"),
        ({"weight_map": {"lm_head.weight": "gone.safetensors"}}, "has no gone.safetensors; it holds config.json"),
        ({"weight_map": {"lm_head.weight": "model.safetensors"}}, None),
        ([], "holds no JSON object"),
    ],
)
def test_an_index_that_leads_nowhere(folder, index, words):
    """One that names too few tensors is read all the same, as long as its files hold all."""
    (folder / hub.INDEX).write_text(json.dumps(index))
    if words is None:
        hub.load(folder)
        return
    with pytest.raises(CheckpointError, match=words):
        hub.load(folder)


def test_a_shard_without_its_tensors_is_noticed(tmp_path, state):
    hub.save(state, CONFIG, tmp_path / "model", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model" / hub.INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    kept = {name: place for name, place in index["weight_map"].items() if place != first}
    (tmp_path / "model" / hub.INDEX).write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(CheckpointError, match=r"missing model.embed_tokens.weight \(61, 32\)"):
        hub.load(tmp_path / "model")


def test_a_step_of_a_folder(folder):
    with pytest.raises(CheckpointError, match="is not a run directory, so it has no steps"):
        hub.load(folder, step=3)
