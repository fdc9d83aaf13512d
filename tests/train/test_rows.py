"""Partition files are never changed in place."""

from pathlib import Path

import numpy as np
import pytest

from puna.errors import CheckpointError
from puna.train.rows import RowStore, newest

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_a_write_makes_a_new_file_and_the_old_one_stays(tmp_path: Path) -> None:
    store = RowStore(tmp_path, "users")
    store.write("0", ROWS)
    before = store.snapshot()
    store.write("0", ROWS + 1)
    assert np.array_equal(store.read("0"), ROWS + 1)
    assert np.array_equal(np.load(tmp_path / "rows" / "users" / before["0"]["file"]), ROWS)
    store.restore(before)
    assert np.array_equal(store.read("0", mapped=True), ROWS)
    assert not store.read("0", mapped=True).flags.writeable


def test_versions_rise_whoever_writes(tmp_path: Path) -> None:
    one, other = RowStore(tmp_path, "users"), RowStore(tmp_path, "users")
    one.write("0", ROWS)
    other.write("0", ROWS + 1)
    one.write("0.x", ROWS)
    assert other.snapshot()["0"]["file"] == "0.00000002.npy"
    assert one.snapshot()["0.x"]["file"] == "0.x.00000001.npy"
    merged = newest([one.snapshot(), other.snapshot()])
    assert (merged["0"]["file"], list(merged)) == ("0.00000002.npy", ["0", "0.x"])


def test_sweeping_removes_what_is_named_and_nothing_else(tmp_path: Path) -> None:
    store = RowStore(tmp_path, "users")
    for step in range(3):
        store.write("0", ROWS + step)
    (store.folder / "1.00000001.npy.tmp").write_bytes(b"torn")
    assert sorted(store.files()) == [*(f"0.0000000{n}.npy" for n in (1, 2, 3)), "1.00000001.npy.tmp"]
    store.sweep(["0.00000001.npy", "1.00000001.npy.tmp", "2.00000001.npy.tmp"])
    assert sorted(store.files()) == ["0.00000002.npy", "0.00000003.npy"]


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_partition_is_named(damage: str, tmp_path: Path) -> None:
    store = RowStore(tmp_path, "users")
    store.write("0", ROWS)
    path = store.folder / "0.00000001.npy"
    snapshot = store.snapshot()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4])
    found = "is missing" if damage == "missing" else "has 172"
    with pytest.raises(
        CheckpointError, match=rf"0\.00000001\.npy should have 176 bytes and {found}. Resume from an older"
    ):
        store.restore(snapshot)


def test_an_unknown_partition_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="table users has no partition 7"):
        RowStore(tmp_path, "users").read("7")


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        RowStore(tmp_path, "users").write("0", np.array([{}], dtype=object))
