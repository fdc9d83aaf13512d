"""Click files become clicks: values, cut-offs, splits, going on after a kill, and what is wrong with a file."""

import gzip
import json

import numpy as np
import pytest

from puna.errors import DataError
from puna.recsys import importing
from puna.recsys.clicks import Clicks
from puna.recsys.importing import Options, import_clicks
from puna.recsys.layouts import AVAZU, CRITEO, parse_columns

SMALL = parse_columns("label,dense:age,table:city,table:shop", ",", "1", "0")
LINES = ["1,3,rome,a", "0,,oslo,b", "0,-2,rome,", "1,7.5,lima,a", "0,1e2,rome,c"]


def write(folder, lines, name="clicks.csv"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def bring(folder, lines=LINES, layout=SMALL, **options):
    import_clicks({"train": [write(folder, lines)]}, folder / "out", layout, Options(**options))
    return Clicks.open(folder / "out")


def everything(clicks):
    return clicks.at(np.arange(clicks.columns["labels"].shape[0]))


def test_values_become_ids_and_numbers(tmp_path):
    clicks = bring(tmp_path)
    found = everything(clicks)
    assert found.labels.tolist() == [1, 0, 0, 1, 0]
    np.testing.assert_allclose(found.dense[:, 0], np.log1p([3, 0, 0, 7.5, 100]), rtol=1e-6)
    assert found.ids.tolist() == [[1, 1], [2, 2], [1, 0], [3, 1], [1, 3]]
    assert clicks.rows == (4, 4)
    assert (clicks.folder / "maps" / "city.txt").read_text() == "rome\noslo\nlima\n"


def test_rare_values_share_row_0_and_frequent_ones_come_first(tmp_path):
    clicks = bring(tmp_path, ["0,1,oslo,b", *LINES], min_count=2, log=False)
    assert everything(clicks).ids[:, 0].tolist() == [2, 1, 2, 1, 0, 1]
    assert clicks.rows == (3, 3)
    assert everything(clicks).dense[:, 0].tolist() == [1, 3, 0, -2, 7.5, 100]


def test_most_rows_of_a_table(tmp_path):
    assert bring(tmp_path, max_rows=2).rows == (2, 2)


def test_values_are_counted_over_training_samples_alone(tmp_path):
    clicks = bring(tmp_path, test_share=0.4)
    assert clicks.splits == {"train": (0, 3), "test": (3, 5)}
    assert everything(clicks).ids[:, 0].tolist() == [1, 2, 1, 0, 1]


BAGS = parse_columns("label,bag:tags:3,table:shop", ",", "1", "0")
TAGGED = ["1,a|b|a,x", "0,,y", "0, c | |b,x", "1,b,"]


def test_bags_of_values(tmp_path):
    """Spaces and empty values left out; -1 where there is no more; a value is counted wherever it stands."""
    clicks = bring(tmp_path, TAGGED, BAGS)
    assert clicks.hots == (3, 1)
    assert clicks.rows == (4, 3)
    values = (clicks.folder / "maps" / "tags.txt").read_text().split()
    assert values[0] == "b"
    found = [[values[n - 1] for n in row[:3] if n > 0] for row in everything(clicks).ids.tolist()]
    assert found == [["a", "b", "a"], [], ["c", "b"], ["b"]]
    assert everything(clicks).ids[1].tolist() == [-1, -1, -1, 2]


def test_rare_values_of_bags_share_row_0(tmp_path):
    clicks = bring(tmp_path, TAGGED, BAGS, min_count=2)
    assert everything(clicks).ids[2, :3].tolist() == [0, 1, -1]


def test_bags_by_hash_by_id_and_by_maps(tmp_path):
    hashed = bring(tmp_path / "hash", TAGGED, BAGS, values="hash", buckets=50)
    ids = everything(hashed).ids[:, :3]
    assert ids[0, 0] == ids[0, 2] > 0
    assert (ids[1] == -1).all()
    numbered = bring(tmp_path / "ids", ["1,4|2,0", "0,,1"], BAGS, values="ids")
    assert everything(numbered).ids.tolist() == [[4, 2, -1, 0], [-1, -1, -1, 1]]
    first = bring(tmp_path / "first", TAGGED, BAGS)
    again = bring(tmp_path / "again", ["1,c|new,x"], BAGS, maps=str(first.folder))
    c = (first.folder / "maps" / "tags.txt").read_text().split().index("c") + 1
    assert everything(again).ids[0, :3].tolist() == [c, 0, -1]


def test_lists_of_parquet_are_bags(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"label": [1, 0, 0], "tags": [["a", None, "b", "a"], [], None], "shop": ["x", "y", "x"]}
    pq.write_table(pa.table(table), tmp_path / "clicks.parquet")
    import_clicks({"train": [tmp_path / "clicks.parquet"]}, tmp_path / "out", BAGS)
    assert everything(Clicks.open(tmp_path / "out")).ids.tolist() == [[1, 2, 1, 1], [-1, -1, -1, 2], [-1, -1, -1, 1]]
    table |= {"tags": [[7, 5], [5], []], "shop": [1, 2, 1]}
    pq.write_table(pa.table(table), tmp_path / "numbers.parquet")
    import_clicks({"train": [tmp_path / "numbers.parquet"]}, tmp_path / "numbers", BAGS, Options(values="ids"))
    assert everything(Clicks.open(tmp_path / "numbers")).ids[:, :3].tolist() == [[7, 5, -1], [5, -1, -1], [-1, -1, -1]]


def test_lists_that_are_no_bags_are_named(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "clicks.parquet"
    pq.write_table(pa.table({"label": [1], "tags": [["a|b"]], "shop": [["x"]]}), path)
    with pytest.raises(DataError, match=r"clicks.parquet, column tags: a value has '\|' in it"):
        import_clicks({"train": [path]}, tmp_path / "out", BAGS)
    pq.write_table(pa.table({"label": [1], "tags": [["a"]], "shop": [["x"]]}), path)
    with pytest.raises(DataError, match=r"clicks.parquet, column shop: it holds lists\. Describe it as bag:shop:SIZE"):
        import_clicks({"train": [path]}, tmp_path / "out", BAGS)


def test_mistakes_around_bags_are_named(tmp_path):
    with pytest.raises(DataError, match=r"clicks.csv, line 2, column tags: 'a\|b\|c\|d' has more than 3 values"):
        bring(tmp_path, ["1,a,x", "0,a|b|c|d,y"], BAGS)
    for words, delimiter in (("label,bag:tags", ","), ("label,bag:tags:1", ","), ("label,bag:tags:2", "|")):
        with pytest.raises(DataError, match=r"column 2 is described as 'bag:tags"):
            parse_columns(words, delimiter, "1", "0")


def test_splits_of_their_own_files(tmp_path):
    train, test = write(tmp_path, LINES[:3]), write(tmp_path, LINES[3:], "later.csv")
    import_clicks({"train": [train], "test": [test]}, tmp_path / "out", SMALL)
    clicks = Clicks.open(tmp_path / "out")
    assert clicks.splits == {"train": (0, 3), "test": (3, 5)}
    assert clicks.take("test", np.array([1])).ids.tolist() == [[1, 0]]


def test_hashed_values(tmp_path):
    clicks = bring(tmp_path, values="hash", buckets=16)
    found = everything(clicks)
    assert clicks.rows == (16, 16)
    assert found.ids[0, 0] == found.ids[2, 0] == found.ids[4, 0] > 0
    assert found.ids[2, 1] == 0
    assert len(set(found.ids[:, 0].tolist())) > 1


def test_ids_as_they_are(tmp_path):
    clicks = bring(tmp_path, ["1,1,5,0", "0,1,0,7"], values="ids")
    assert clicks.rows == (6, 8)
    with pytest.raises(DataError, match=r"line 2, column shop: the id 7 is beyond its table of 6 rows"):
        bring(tmp_path / "out", ["1,1,5,0", "0,1,0,7"], values="ids", buckets=6)


def test_criteo_and_parquet_agree(tmp_path, data_dir):
    """The same rows as text and as Parquet."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = data_dir / "ctr-criteo" / "kaggle_dev.tsv.gz"
    rows = [line.rstrip("\n").split("\t") for line in gzip.decompress(source.read_bytes()).decode().splitlines()]
    columns = {
        name: pa.array([row[n] or None if role == "table" else (int(row[n]) if row[n] else None) for row in rows])
        for n, (name, role) in enumerate(zip(CRITEO.names, CRITEO.roles, strict=True))
    }
    pq.write_table(pa.table(columns), tmp_path / "dev.parquet")
    import_clicks({"train": [source]}, tmp_path / "text", CRITEO)
    import_clicks({"train": [tmp_path / "dev.parquet"]}, tmp_path / "parquet", CRITEO)
    text, parquet = (Clicks.open(tmp_path / name) for name in ("text", "parquet"))
    assert len(text.tables) == 26
    assert len(text.dense) == 13
    assert text.rows == parquet.rows
    for name in ("labels", "dense", "ids"):
        assert np.array_equal(text.columns[name], parquet.columns[name])
    assert text.columns["labels"].mean() == pytest.approx(0.227, abs=0.001)


def test_avazu_with_and_without_a_header(tmp_path, data_dir):
    folder = data_dir / "ctr-avazu"
    files = {"train": [folder / "train.csv.gz"], "test": [folder / "test.csv.gz"]}
    figures = import_clicks(files, tmp_path / "out", AVAZU)
    assert figures["splits"] == {"train": 8087, "test": 432}
    clicks = Clicks.open(tmp_path / "out")
    assert clicks.dense == ("hour_of_day", "day_of_week")
    assert clicks.columns["labels"][:8087].mean() == pytest.approx(0.173, abs=0.001)
    assert clicks.columns["dense"][0].tolist() == [0, 1]  # midnight of Tuesday, 21 October 2014


def test_adult_by_columns(tmp_path, data_dir):
    words = (
        "dense:age,table:work,dense:weight,table:school,dense:years,table:marriage,table:job,table:role,table:race,"
        "table:sex,dense:gain,dense:loss,dense:hours,table:country,label"
    )
    layout = parse_columns(words, ",", ">50K", None)
    figures = import_clicks({"train": [data_dir / "ctr-adult-census" / "adult-train.csv.gz"]}, tmp_path / "out", layout)
    assert figures["samples"] == 32_561
    assert figures["click_rate"] == pytest.approx(0.241, abs=0.001)
    assert figures["tables"]["sex"] == 3


def test_an_import_goes_on_where_it_was_cut_short(tmp_path, monkeypatch):
    """Killed after some blocks; what comes out is what an import without a break gives."""
    rng = np.random.default_rng(0)
    lines = [f"{rng.integers(2)},{rng.integers(99)},c{rng.integers(50)},s{rng.integers(900)}" for _ in range(5000)]
    path = write(tmp_path, lines)
    monkeypatch.setattr("puna.sparse.text.BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(importing, "JOURNAL_BLOCKS", 3)
    import_clicks({"train": [path]}, tmp_path / "straight", SMALL, Options(min_count=3, test_share=0.1))
    real, calls = importing._Stage._append, []

    def dies(self, block):
        calls.append(len(block))
        if len(calls) == 11:
            raise KeyboardInterrupt
        real(self, block)

    monkeypatch.setattr(importing._Stage, "_append", dies)
    with pytest.raises(KeyboardInterrupt):
        import_clicks({"train": [path]}, tmp_path / "cut", SMALL, Options(min_count=3, test_share=0.1))
    journal = json.loads((tmp_path / "cut" / "importing" / "journal.json").read_bytes())
    assert 0 < journal["done"]["rows"] < sum(calls)
    with pytest.raises(DataError, match="begun with other files or options"):
        import_clicks({"train": [path]}, tmp_path / "cut", SMALL, Options(min_count=2))
    begun = len(calls)
    import_clicks({"train": [path]}, tmp_path / "cut", SMALL, Options(min_count=3, test_share=0.1))
    assert sum(calls[begun:]) == 5000 - journal["done"]["rows"]
    for name in ("labels", "dense", "ids", "maps/city.txt", "maps/shop.txt"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_maps_of_an_earlier_import(tmp_path):
    first = bring(tmp_path)
    later = write(tmp_path, ["1,1,lima,c", "0,1,paris,b"], "later.csv")
    import_clicks({"train": [later]}, tmp_path / "shared", SMALL, Options(maps=str(first.folder)))
    clicks = Clicks.open(tmp_path / "shared")
    assert everything(clicks).ids.tolist() == [[3, 3], [0, 2]]
    assert clicks.rows == first.rows
    with pytest.raises(DataError, match=r"later.csv, line 2, column city: the value 'paris' is not in the map of"):
        import_clicks({"train": [later]}, tmp_path / "no", SMALL, Options(maps=str(first.folder), unseen="refuse"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["1,3,rome,a", "0,1,oslo"], r"clicks.csv, line 2 has 3 columns where 4 were expected .* it lacks is shop"),
        (["1,3,rome,a", "", "2,1,oslo,b"], r"clicks.csv, line 3, column label: the label is '2', not 1 or 0"),
        (["1,3,rome,a", "0,abc,oslo,b"], r"clicks.csv, line 2, column age: 'abc' is not a finite number"),
        (["1,inf,rome,a"], r"line 1, column age: 'inf' is not a finite number"),
        (["label,age,city", "1,3,rome"], r"line 1: the header lacks the column shop"),
        (["label,city,age,shop", "1,3,rome,b"], r"line 1: the header has the columns label, city, age, shop, not"),
        ([], r"clicks.csv has no sample to train on"),
    ],
)
def test_a_bad_row_is_named(tmp_path, lines, words):
    with pytest.raises(DataError, match=words):
        bring(tmp_path, lines)


def test_a_truncated_gzip_is_named(tmp_path):
    whole = gzip.compress("".join(f"1,{n},c{n},s\n" for n in range(50_000)).encode())
    path = tmp_path / "clicks.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"clicks.csv.gz is damaged or cut short after line \d"):
        import_clicks({"train": [path]}, tmp_path / "out", SMALL)


def test_a_parquet_file_without_a_column_is_named(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"label": [1], "age": [2], "city": ["rome"]}), tmp_path / "clicks.parquet")
    with pytest.raises(DataError, match=r"clicks.parquet lacks the column shop; it has label, age, city"):
        import_clicks({"train": [tmp_path / "clicks.parquet"]}, tmp_path / "out", SMALL)


def test_times_that_fall_are_named(tmp_path):
    layout = parse_columns("label,hour,table:city", ",", "1", "0")
    with pytest.raises(DataError, match=r"line 2, column hour: 14102022 comes after 14102023"):
        bring(tmp_path, ["1,14102023,rome", "0,14102022,rome"], layout)
    with pytest.raises(DataError, match=r"line 1, column hour: '14103324' is not a time"):
        bring(tmp_path / "out", ["1,14103324,rome"], layout)


def test_clicks_that_are_damaged_are_named(tmp_path):
    clicks = bring(tmp_path)
    with pytest.raises(DataError, match="holds clicks already"):
        bring(tmp_path)
    with pytest.raises(DataError, match=r"has no split 'valid'; it has train"):
        clicks.count("valid")
    (clicks.folder / "labels").write_bytes(b"1")
    with pytest.raises(DataError, match=r"labels should have 5 bytes and has 1"):
        Clicks.open(clicks.folder)
    with pytest.raises(DataError, match="holds no clicks"):
        Clicks.open(tmp_path)
