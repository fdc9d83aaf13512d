"""The manifest and its two stores: whole or not there, and every misfit named."""

import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from puna.errors import CheckpointError, RunLocked
from puna.train import checkpoint, manifest, mesh
from puna.train.optim import Average
from puna.train.rows import RowStore
from puna.train.task import Cursor, Json, Rows, State, Tensors


class Holder:
    """One of each kind of state."""

    def __init__(self, run: Path, fill: float = 0.0) -> None:
        self.tensors = {"a": torch.full((3, 2), fill), "b": torch.full((), fill, dtype=torch.bfloat16)}
        self.store, self.number, self.told = RowStore(run, "users"), fill, 0
        self.store.write("0", np.full((2, 2), fill))

    def state(self) -> State:
        return {
            "weights": Tensors(lambda: self.tensors, lambda tensors: setattr(self, "told", len(tensors))),
            "users": Rows(self.store),
            "number": Json(lambda: self.number, lambda value: setattr(self, "number", value)),
        }

    def save(self, run: Path, step: int, keep: int = 2) -> checkpoint.Manifest:
        return checkpoint.save(run, self.state(), Cursor(step, 10 * step), keep)


def test_all_three_kinds_come_back(tmp_path: Path) -> None:
    Holder(tmp_path, 7.0).save(tmp_path, 3)
    holder = Holder(tmp_path, 1.0)
    loaded = checkpoint.load(tmp_path, holder.state())
    assert loaded.cursor == Cursor(3, 30)
    assert loaded == checkpoint.latest(tmp_path) == checkpoint.verify(tmp_path, 3)
    assert (holder.tensors["a"] == 7).all()
    assert holder.tensors["b"] == 7
    assert (holder.store.read("0") == 7).all()
    assert (holder.number, holder.told) == (7.0, 2)


def test_the_manifest_tells_what_is_there(tmp_path: Path) -> None:
    written = Holder(tmp_path).save(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "step-00000003"
    raw = json.loads((folder / "manifest.json").read_text())
    assert (raw["format_version"], raw["world_size"]) == (3, 1)
    assert raw["cursor"] == {"units": 3, "tokens": 30, "skipped": 0}
    assert raw["tensors"] == {"weights.a": [3, 2], "weights.b": []}
    assert raw["versions"]["torch"] == torch.__version__
    files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    del files["manifest.json"]
    assert {name: entry["bytes"] for name, entry in raw["files"].items()} == files
    assert {name: entry["sha256"] for name, entry in raw["files"].items()} == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files
    }
    assert written.num_bytes == sum(files.values()) + (tmp_path / "rows/users/0.00000001.npy").stat().st_size


def test_the_newest_and_the_initial_one_are_kept(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    for step in (0, 1, 2, 3, 4):
        holder.store.write("0", np.full((2, 2), step))
        holder.save(tmp_path, step)
    assert checkpoint.complete_steps(tmp_path) == [0, 3, 4]
    assert len(list((tmp_path / "rows" / "users").iterdir())) == 3
    for step in (0, 3, 4):
        checkpoint.load(tmp_path, holder.state(), step)
        assert (holder.store.read("0") == step).all()


def test_a_folder_without_a_manifest_does_not_exist_and_goes_at_the_next_save(tmp_path: Path) -> None:
    holder = Holder(tmp_path, 1.0)
    holder.save(tmp_path, 1)
    holder.save(tmp_path, 2)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert checkpoint.latest(tmp_path).cursor.units == 1
    assert [path.name for path in checkpoint.incomplete(tmp_path)] == ["step-00000002"]
    holder.save(tmp_path, 2)
    assert not checkpoint.incomplete(tmp_path)
    assert checkpoint.complete_steps(tmp_path) == [1, 2]


def test_a_missing_checkpoint_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoints has no complete checkpoint. Steps that are there: none"):
        checkpoint.load(tmp_path, {})
    Holder(tmp_path).save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 2. Steps that are there: 1"):
        checkpoint.load(tmp_path, {}, step=2)


def damaged(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / name
        contents = change(path.read_bytes())
        path.unlink() if contents is None else path.write_bytes(contents)

    return act


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged("tensors/__0_0.distcp", lambda b: None), r"__0_0\.distcp should have \d+ bytes and is missing"),
        (damaged("tensors/__0_0.distcp", lambda b: b[:-1]), r"__0_0\.distcp should have \d+ bytes and has \d+"),
        (damaged("tensors/__0_0.distcp", lambda b: b[:-1] + b"x"), r"__0_0\.distcp has other contents than were saved"),
        (damaged("tensors/.metadata", lambda b: b"y" + b[1:]), r"\.metadata has other contents than were saved"),
        (damaged("manifest.json", lambda b: b[:-9]), r"manifest\.json is damaged"),
        (
            damaged("manifest.json", lambda b: b.replace(b"30", b"31")),
            r"manifest\.json has other contents than were saved",
        ),
        (damaged("manifest.json", lambda b: b"{}"), r"manifest\.json is damaged: 'format_version'"),
        (
            damaged("../../rows/users/0.00000001.npy", lambda b: None),
            r"0\.00000001\.npy should have 160 bytes and is mis",
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    holder.save(tmp_path, 3)
    damage(tmp_path / "checkpoints" / "step-00000003")
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(tmp_path, holder.state())


def test_verify_hashes_row_partitions(tmp_path: Path) -> None:
    Holder(tmp_path).save(tmp_path, 1)
    path = tmp_path / "rows" / "users" / "0.00000001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        CheckpointError, match=r"0\.00000001\.npy has other contents than were saved \(SHA-256 differs\)"
    ):
        checkpoint.verify(tmp_path)


def changed(**entries: Any) -> Callable[[Holder], State]:
    return lambda holder: {k: v for k, v in (holder.state() | entries).items() if v is not None}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (changed(number=None), "do not both have number; the checkpoint holds number, users, weights"),
        (changed(scale=Json(lambda: 1, print)), "do not both have scale"),
        (changed(users=None), "do not both have users"),
        (changed(weights=None), r"holds weights\.a \(2 such\), which has no place here"),
        (changed(optim=Tensors(lambda: {"x": torch.ones(1)})), r"has no tensor optim\.x; it has 2, such as weights\.a"),
        (
            changed(weights=Tensors(lambda: {"a": torch.ones(2, 2), "b": torch.ones(())})),
            r"holds weights\.a as \[3, 2\], but here it is \[2, 2\]. Use the recipe that the checkpoint was made with",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_named(state: Callable[[Holder], State], words: str, tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    holder.save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(tmp_path, state(holder))


def test_older_manifests_are_migrated_and_newer_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder(tmp_path)
    holder.save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    raw = json.loads(path.read_text())
    older = {k: v for k, v in raw.items() if k not in ("world_size", "heldout_loss", "sha256")}
    path.write_text(json.dumps(older | {"format_version": 0, "ranks": 5}))
    monkeypatch.setitem(
        manifest.MIGRATIONS,
        0,
        lambda old: {k: v for k, v in old.items() if k != "ranks"} | {"world_size": old["ranks"]},
    )
    loaded = checkpoint.load(tmp_path, holder.state())
    assert (loaded.format_version, loaded.world_size, loaded.heldout_loss) == (3, 5, None)
    path.write_text(json.dumps(raw | {"format_version": 4, "versions": {"puna": "9.9"}}))
    with pytest.raises(
        CheckpointError, match=r"has format version 4; this Puna .* reads up to 3. Use the Puna .* \(9\.9\)"
    ):
        checkpoint.load(tmp_path, holder.state())


def test_a_checkpoint_of_the_first_format_is_read_and_verified(tmp_path: Path) -> None:
    """Version 1 had no hash of itself, and none of large files."""
    holder = Holder(tmp_path, 4.0)
    holder.save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    raw = json.loads(path.read_text())
    for entry in raw["files"].values():
        del entry["sha256"]
    first = {k: v for k, v in raw.items() if k not in ("heldout_loss", "sha256")}
    path.write_text(json.dumps(first | {"format_version": 1}))
    checkpoint.verify(tmp_path)
    assert checkpoint.load(tmp_path, Holder(tmp_path).state()).heldout_loss is None


def test_a_cursor_of_the_second_format_has_passed_over_nothing(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    holder.save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    raw = json.loads(path.read_text())
    del raw["sha256"], raw["cursor"]["skipped"]
    second = raw | {"format_version": 2}
    path.write_text(json.dumps(second | {"sha256": hashlib.sha256(json.dumps(second).encode()).hexdigest()}))
    assert checkpoint.load(tmp_path, holder.state()).cursor == Cursor(1, 10, 0)


def test_states_aside_are_restored_where_they_fit_and_begin_anew_elsewhere(tmp_path: Path) -> None:
    kept: dict[str, Any] = {"health": 5, "sample": torch.ones(3)}

    def state(size: int = 3) -> State:
        return Holder(tmp_path).state() | {
            "health": Json(lambda: kept["health"], partial(kept.__setitem__, "health")),
            "health_sample": Tensors(lambda: {"a": kept["sample"][:size]}),
        }

    checkpoint.save(tmp_path, Holder(tmp_path).state(), Cursor(1, 10), 9)
    checkpoint.save(tmp_path, state(), Cursor(2, 20), 9)
    kept |= {"health": 6, "sample": torch.zeros(3)}
    checkpoint.load(tmp_path, state(), 1)
    assert (kept["health"], kept["sample"].tolist()) == (6, [0, 0, 0]), "the checkpoint has none"
    checkpoint.load(tmp_path, Holder(tmp_path).state(), 2)
    checkpoint.load(tmp_path, state(2), 2)
    assert (kept["health"], kept["sample"].tolist()) == (5, [0, 0, 0]), "a sample of another size is left"
    checkpoint.load(tmp_path, state(), 2)
    assert kept["sample"].tolist() == [1, 1, 1]


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    holder.save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step-00000001"
    index = folder / "tensors" / ".metadata"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    index.write_bytes(pickle.dumps(Evil()))
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"]["tensors/.metadata"] = {"bytes": index.stat().st_size}
    del raw["sha256"]
    (folder / "manifest.json").write_text(json.dumps(raw | {"sha256": manifest._digest(raw)}))
    with pytest.raises(CheckpointError, match=r"asks for .*Do not load this checkpoint"):
        checkpoint.load(tmp_path, holder.state())
    assert not (tmp_path / "owned").exists()


def test_one_module_is_loaded_without_a_process_group(tmp_path: Path) -> None:
    task = toys.Regression(3)
    for unit in task.units(Cursor()):
        task.step(unit)
    checkpoint.save(tmp_path, task.state(), Cursor(3, 48), 1)
    for name, wanted in (("model", task.modules["model"].state_dict()), ("average.model", task.average.tensors())):
        model = toys.network(9)
        checkpoint.load_module(tmp_path, model, name=name)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, wanted[key if name == "model" else f"model.{key}"])
    with pytest.raises(CheckpointError, match=r"do not both have other; the checkpoint holds average, .*model, optim"):
        checkpoint.load_module(tmp_path, toys.network(9), name="other")
    with pytest.raises(CheckpointError, match=r"holds model\.0\.weight as \[8, 6\], but here it is \[5, 6\]"):
        checkpoint.load_module(tmp_path, toys.network(9, width=5))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.1\.weight"):
        checkpoint.load_module(tmp_path, nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)))


def test_buffers_that_persist_are_saved_and_tied_weights_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[1].weight
    model.register_buffer("scratch", torch.ones(1), persistent=False)
    checkpoint.save(tmp_path, toys.GradientTask.state(_only(model)), Cursor(1, 1), 1)
    keys = set(checkpoint.read_manifest(tmp_path).tensors)
    assert {"model.0.running_mean", "model.1.weight", "model.2.bias"} <= keys
    assert not {"model.2.weight", "model.scratch"} & keys


def _only(model: nn.Module) -> toys.Regression:
    task = toys.Regression.__new__(toys.Regression)
    toys.GradientTask.__init__(task, {"model": model}, {"sgd": torch.optim.SGD(model.parameters(), lr=1)})
    return task


def write_sharded(run: str) -> None:
    """On four ranks: shards that divide unevenly, and a partition written by the last rank."""
    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(model)
    store = RowStore(run, "users")
    store.write(str(mesh.rank()), np.full((2, 2), float(mesh.rank())))
    average = Average({"model": model}, "mean")
    state: State = {
        "model": Tensors(lambda: dict(model.named_parameters())),
        "average": Tensors(average.tensors),
        "users": Rows(store),
    }
    checkpoint.save(Path(run), state, Cursor(4, 4), 1)
    assert sorted(store.snapshot()) == ["0", "1", "2", "3"], "every rank knows every partition now"
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoint.load(Path(run), state)
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        assert torch.equal(p.full_tensor(), wanted[name])


def test_shards_of_four_ranks_are_read_by_one(tmp_path: Path, ranks: Any) -> None:
    ranks(write_sharded, str(tmp_path))
    assert checkpoint.read_manifest(tmp_path).world_size == 4
    torch.manual_seed(0)
    wanted, model = nn.Linear(5, 7), nn.Linear(5, 7)
    checkpoint.load_module(tmp_path, model)
    assert torch.equal(model.weight, wanted.weight)
    assert torch.equal(model.bias, wanted.bias)


def test_the_lock_names_its_owner_and_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LOCK_SECONDS", 0.1)
    with checkpoint.hold_lock(tmp_path):
        with (
            pytest.raises(RunLocked, match=r"is in use by process \d+ on .*--run\.dir") as caught,
            checkpoint.hold_lock(tmp_path),
        ):
            pass
        assert caught.value.exit_code == 3
    with checkpoint.hold_lock(tmp_path):
        pass


def locked(run: str) -> str:
    try:
        with checkpoint.hold_lock(Path(run)):
            return "held"
    except RunLocked as error:
        return str(error)


def test_every_rank_is_refused_together(tmp_path: Path, ranks: Any) -> None:
    assert ranks(locked, str(tmp_path)) == ["held"] * 4
    with checkpoint.hold_lock(tmp_path):
        assert all("is in use by process" in said for said in ranks(locked, str(tmp_path)))


def test_a_small_model_is_saved_quickly(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(40)))
    state: State = {"model": Tensors(lambda: {name: p.detach() for name, p in model.named_parameters()})}
    checkpoint.save(tmp_path, state, Cursor(1, 1), 1)
    began = time.process_time()
    checkpoint.save(tmp_path, state, Cursor(2, 2), 1)
    assert time.process_time() - began < 0.5
    shutil.rmtree(tmp_path)
