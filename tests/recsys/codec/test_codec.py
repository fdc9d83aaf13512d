"""`Codec`: threads, buffers that are used again; the choice of a codec; the verbs."""

import json
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from puna.cli import puna
from puna.errors import DataError
from puna.recsys.codec.api import Codec, Slice, decode, encode
from puna.recsys.codec.choose import Measured, exchange_time, measure, pick, speedup


def test_streams_are_the_same_for_any_number_of_threads(lookups):
    slices = [Slice(*lookups(n, 16, n), 0.02) for n in (3, 50, 900, 20_000)]
    slices += [Slice(rows, None, 0.05) for rows, *_ in slices] + [Slice(np.zeros((0, 4), np.float32))]
    wanted, num_running = [encode(*s) for s in slices], threading.active_count()
    for num_threads in (1, 2, 5):
        with Codec(num_threads) as codec:
            streams = codec.encode_many(slices)
            assert streams == wanted
            outs = [np.empty_like(s.rows) for s in slices]
            rows = codec.decode_many(streams, [s.ids for s in slices], outs)
            assert all(a is b for a, b in zip(rows, outs, strict=True))
            assert all((a == decode(s, c.ids)).all() for a, s, c in zip(rows, streams, slices, strict=True))
            assert codec.encode_many([]) == []
    assert threading.active_count() == num_running


def test_a_mistake_in_one_slice_is_told(lookups):
    with Codec(2) as codec, pytest.raises(DataError, match="the bound is 7"):
        codec.encode_many([Slice(lookups(3, 8)[0])] * 3 + [Slice(lookups(3, 8)[0], None, 7)])


def test_buffers_that_were_used_do_not_show(case_of):
    codec = Codec()
    for seed in range(300):
        case = case_of(seed)
        stream = codec.encode(case.rows, case.ids, case.bound)
        assert stream == Codec().encode(case.rows, case.ids, case.bound)
        again = codec.decode(stream, case.ids)
        assert (again.view(np.uint32) == Codec().decode(stream, case.ids).view(np.uint32)).all()


def test_arrays_that_are_not_contiguous_and_ids_of_any_whole_type(lookups):
    rows, ids = lookups(100, 16)
    assert encode(np.asfortranarray(rows), ids.astype(np.uint8)) == encode(rows, ids)
    stream = encode(rows, ids)
    assert (decode(np.frombuffer(stream, np.uint8), ids.astype(np.int32)) == decode(stream, ids)).all()


def test_auto_is_the_smallest(lookups):
    for num_rows in (2, 3, 40, 5000):
        for width in (3, 16):
            rows, ids = lookups(num_rows, width)
            sizes = {name: len(encode(rows, ids, 0.03, name)) for name in ("auto", "rans", "fixed", "raw")}
            assert sizes["auto"] <= min(sizes.values()) + 4


def test_the_formula():
    measured = Measured(20.0, 2e9, 4e9)
    assert exchange_time(measured, 1e9) == pytest.approx(0.05 + 0.75)
    assert speedup(measured, 1e9) == pytest.approx(1.25)


def test_the_choice_moves_to_faster_codecs_and_to_none_as_the_link_grows():
    measured = {"rans": Measured(20, 1e9, 2e9), "fixed": Measured(10, 8e9, 8e9), "raw": Measured(2, 3e10, 3e10)}
    picked = [pick(measured, link) for link in (1e6, 1e8, 1e9, 5e9, 1e10, 1e11)]
    assert picked == ["rans", "fixed", "fixed", "raw", "plain", "plain"]
    assert pick({}, 1e9) == "plain"


def test_measure(lookups):
    rows, ids = lookups(5000, 64)
    found = measure(Codec(), Slice(rows, ids, 0.01))
    assert list(found) == ["copy", "raw", "fixed", "rans"]
    assert found["rans"].ratio > found["fixed"].ratio > found["raw"].ratio > 1 > found["copy"].ratio > 0.999
    assert all(m.encode_bytes_per_s > 1e6 and m.decode_bytes_per_s > 1e6 for m in found.values())


def run(*words) -> str:
    result = CliRunner().invoke(puna, ["recsys", "codec", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_verbs(tmp_path, lookups, check_bound):
    rows, ids = lookups(5000, 32)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "ids.npy", ids)
    for known in ([], ["--ids", tmp_path / "ids.npy"]):
        file, out = tmp_path / "rows.puna", tmp_path / "again.npy"
        figures = json.loads(run("encode", tmp_path / "rows.npy", *known, "--bound", "0.01", "--out", file, "--json"))
        assert figures["rows"] == 2048
        assert figures["distinct_rows"] == len(np.unique(ids))
        assert figures["bytes"] == file.stat().st_size
        assert figures["ratio"] == rows.nbytes / figures["bytes"]
        assert figures["codec"] == "rans"
        assert figures["error_bound"] == pytest.approx(0.01 * (rows.max() - rows.min()))
        assert file.read_bytes() == encode(rows, ids if known else None, 0.01)
        back = json.loads(run("decode", file, *known, "--out", out, "--json"))
        assert (back["rows"], back["width"]) == (2048, 32)
        check_bound(rows, np.load(out), 0.01)
    assert "ratio" in run("encode", tmp_path / "rows.npy", "--out", tmp_path / "b", "--codec", "fixed")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["encode", "text.npy", "--out", "o"], r"text.npy is not a .npy file of numbers .*Write it by numpy.save"),
        (["encode", "ids.npy", "--out", "o"], r"ids.npy: rows are int64 of shape \(4,\). They must be float32"),
        (["encode", "rows.npy", "--ids", "ids.npy", "--out", "o"], r"rows.npy with .*ids.npy: ids are int64 of shape"),
        (["encode", "rows.npy", "--bound", "0", "--out", "o"], r"rows.npy: the bound is 0.0"),
        (["decode", "rows.npy", "--out", "o"], r"rows.npy: the codec stream is damaged: it begins with 0x93"),
        (["decode", "cut.puna", "--out", "o"], r"cut.puna: the codec stream is damaged: .* Send or write it again"),
    ],
)
def test_mistakes_name_the_file(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    np.save("rows.npy", rows)
    np.save("ids.npy", np.arange(4))
    (tmp_path / "text.npy").write_text("one, two")
    (tmp_path / "cut.puna").write_bytes(encode(rows)[:-3])
    with pytest.raises(DataError, match=said):
        CliRunner().invoke(puna, ["recsys", "codec", *words], catch_exceptions=False)
    assert not (tmp_path / "o").exists()
