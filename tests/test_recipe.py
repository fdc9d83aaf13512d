"""Recipes: layers and their origins, the published sizes, and every sentence a user may read."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna import recipe
from puna.errors import RecipeError
from puna.llama.config import RopeScaling

PUBLISHED = {  # exact counts: 2 V d (or V d where tied) + L (2 d H h + 2 d K h + 3 d F + 2 d) + d
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}
GRAPHS = {"fb15k-complex", "fb15k-complex-best", "fb15k-transe", "fb15k-237", "wn18rr", "graph-small"} | {
    "social",
    "blogcatalog",
}
DLRMS = {f"dlrm-{name}" for name in ("kaggle", "kaggle-32", "terabyte", "mlperf", "mlperf-v2", "tiny")}
PEAK_LR = {"llama2-7b": 3e-4, "llama2-13b": 3e-4, "llama2-70b": 1.5e-4, "llama3-8b": 3e-4, "llama3-70b": 1.5e-4} | {
    "llama3-405b": 8e-5,
    "llama3.1-405b": 8e-5,
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str, name: str | Path = "tiny") -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(name, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- what ships


def test_every_published_size_ships():
    assert set(recipe.names()) == {*PUBLISHED, *GRAPHS, *DLRMS, "tiny", "demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_of_a_published_size(name):
    assert recipe.load(name).recipe.model.num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", PEAK_LR)
def test_published_peak_learning_rate(name):
    assert recipe.load(name).recipe.train.lr == PEAK_LR[name]


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-405b", "llama3.1-70b"])
def test_llama3_ramp_and_warmup(name):
    found = recipe.load(name).recipe
    first, second, third = recipe.stages(found)
    assert (first.batch_tokens, first.seq_len) == (1024 * 4096, 4096)
    assert (second.start, second.batch_tokens, second.seq_len) == (252_000_000, 1024 * 8192, 8192)
    assert (third.start, third.batch_tokens, third.seq_len) == (2_870_000_000_000, 2048 * 8192, 8192)
    consumed = 0
    for _ in range(8_000):
        consumed += first.batch_tokens if consumed < second.start else second.batch_tokens
    assert found.schedule.warmup_tokens == consumed


def test_llama2_schedule():
    found = recipe.load("llama2-70b").recipe
    assert found.schedule.warmup_tokens == 2_000 * found.train.batch_tokens
    assert found.schedule.final_ratio == 0.1
    assert found.train.eps == 1e-5


def test_rope_scaling_only_from_3_1_on():
    assert recipe.load("llama3-8b").recipe.model.rope_scaling is None
    assert recipe.load("llama3.1-8b").recipe.model.rope_scaling == RopeScaling(factor=8.0)
    assert recipe.load("llama3.2-3b").recipe.model.rope_scaling == RopeScaling(factor=32.0)


@pytest.mark.parametrize("name", recipe.names())
def test_resolved_text_reads_back_equal(name, tmp_path):
    loaded = recipe.load(name)
    assert recipe.load(write(tmp_path / "recipe.toml", loaded.text)).recipe == loaded.recipe


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_small_recipes_divide_over_two_ranks(name):
    recipe.check_ranks(recipe.load(name).recipe, 2)


# --- layers


def test_later_layers_win_and_are_named(tmp_path):
    write(tmp_path / "base.toml", 'extends = "tiny"\n[train]\nlr = 0.5\nmicro_batch = 2\n')
    path = write(tmp_path / "mine.toml", 'extends = "base.toml"\n[train]\nlr = 0.25\n')
    loaded = recipe.load(path, ["--run.seed", "7"])
    assert (loaded.recipe.train.lr, loaded.recipe.train.micro_batch, loaded.recipe.run.seed) == (0.25, 2, 7)
    layers = [
        loaded.origins[key] for key in ("train.betas", "train.seq_len", "train.micro_batch", "train.lr", "run.seed")
    ]
    assert layers == ["default", "recipe tiny", f"file {tmp_path / 'base.toml'}", f"file {path}", "flag"]


def test_a_run_directory_is_a_recipe(tmp_path):
    write(tmp_path / "recipe.toml", recipe.load("tiny", ["--run.seed", "3"]).text)
    assert recipe.load(tmp_path).recipe.run.seed == 3


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--train.lr", "3e-4"], "train.lr", 3e-4),
        (["--train.lr=3e-4"], "train.lr", 3e-4),
        (["--train.lr", "1"], "train.lr", 1.0),
        (["--train.tokens", "1_000_000"], "train.tokens", 1_000_000),
        (["--train.compile", "true"], "train.compile", True),
        (["--train.recompute", "none"], "train.recompute", "none"),
        (["--train.betas", "[0.8, 0.9]"], "train.betas", (0.8, 0.9)),
        (["--run.dir", "2026"], "run.dir", "2026"),
        (["--run.dir", "a b = c"], "run.dir", "a b = c"),
        (["--run.dir", '"quoted"'], "run.dir", '"quoted"'),
        (["--model.rope_scaling.factor", "4.0"], "model.rope_scaling.factor", 4.0),
        (["--model.rope_scaling", "{factor = 4.0}"], "model.rope_scaling.factor", 4.0),
        (["--schedule.batch_stages", "[[1024, 2048]]"], "schedule.batch_stages", ((1024, 2048),)),
    ],
)
def test_flag_values(words, key, value):
    loaded = recipe.load("tiny", words)
    row = next(row for row in recipe.show(loaded) if row["key"] == key)
    assert row["value"] == value
    assert type(row["value"]) in (type(value), int)
    assert row["layer"] == "flag"


def test_none_unsets_an_optional_section():
    loaded = recipe.load("llama3.1-8b", ["--model.rope_scaling", "none"])
    assert loaded.recipe.model.rope_scaling is None
    assert loaded.origins["model.rope_scaling"] == "flag"


def test_none_unsets_in_a_file_and_a_flag_sets_again(tmp_path):
    path = write(tmp_path / "r.toml", 'extends = "llama3.2-1b"\n[model]\nrope_scaling = "none"\n')
    assert recipe.load(path).recipe.model.rope_scaling is None
    again = recipe.load(path, ["--model.rope_scaling.factor", "16.0"])
    assert again.recipe.model.rope_scaling == RopeScaling(factor=16.0)
    assert again.origins["model.rope_scaling.low_freq_factor"] == "default"


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00")))
def test_any_text_survives_flag_and_file(text):
    loaded = recipe.load("tiny", [f"--run.dir={text}"])
    assert loaded.recipe.run.dir == text
    assert tomllib.loads(loaded.text)["run"]["dir"] == text


@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(min_value=0, max_value=2**60))
def test_any_number_survives_flag_and_file(lr, seed):
    loaded = recipe.load("tiny", ["--train.lr", repr(lr), "--run.seed", str(seed)])
    assert (loaded.recipe.train.lr, loaded.recipe.run.seed) == (lr, seed)
    table = tomllib.loads(loaded.text)
    assert (table["train"]["lr"], table["run"]["seed"]) == (lr, seed)


# --- what a user reads


def test_unknown_key_in_a_flag():
    assert refusal("--train.lrr", "1") == "train.lrr: unknown key in flag. Did you mean train.lr?"


def test_unknown_key_in_the_wrong_section():
    assert refusal("--train.dim", "1") == "train.dim: unknown key in flag. Did you mean model.dim?"


def test_unknown_key_in_a_file_names_the_line(tmp_path):
    path = write(tmp_path / "r.toml", "[train]\nlr = 1.0\nsqe_len = 4\n")
    assert refusal(name=path) == f"train.sqe_len: unknown key in file {path}, line 3. Did you mean train.seq_len?"


def test_unknown_section(tmp_path):
    path = write(tmp_path / "r.toml", "[modle]\ndim = 4\n")
    assert "modle: unknown key" in refusal(name=path)
    assert "Did you mean model?" in refusal(name=path)


def test_wrong_type_names_key_value_layer_and_what_is_allowed():
    words = refusal("--train.lr", "fast")
    assert words == 'train.lr = "fast" (flag) is not allowed. It must be a number, more than 0.'


def test_whole_number_written_with_an_exponent():
    assert refusal("--train.tokens", "1e6").endswith("It must be a whole number, at least 1; write 1_000_000.")


def test_limit_in_a_file_names_the_line(tmp_path):
    path = write(tmp_path / "r.toml", "\n[checkpoint]\nevery = 0\n")
    assert refusal(name=path) == (
        f"checkpoint.every = 0 (file {path}, line 3) is not allowed. It must be a whole number, at least 1."
    )


def test_misspelt_choice():
    words = refusal("--train.recompute", "ful")
    assert words.endswith("It must be one of none, selective, full; did you mean full?")


def test_value_inside_a_list():
    words = refusal("--schedule.batch_stages", "[[100, 'x']]")
    assert "schedule.batch_stages" in words
    assert words.endswith("It must be a list of [a whole number, a whole number].")


def test_none_where_a_value_is_needed():
    assert "It must be a whole number" in refusal("--train.tokens", "none")


def test_section_as_value():
    assert refusal("--model", "3") == "model = 3 (flag): model is a section. Set the keys inside it."
    assert refusal("--model.rope_scaling", "3").endswith("Set the keys inside it, or none.")


def test_flag_without_value():
    assert (
        refusal("--train.compile")
        == "--train.compile has no value. Write --train.compile VALUE; booleans too: true or false."
    )
    assert "--train.lr has no value" in refusal("--train.lr", "--run.seed", "1")


def test_word_that_is_no_flag():
    assert refusal("lr=3") == "'lr=3' is neither a flag nor a flag's value. Write --section.key value."


def test_misspelt_recipe_lists_what_ships_nearest_first():
    words = refusal(name="lama3.1-8b")
    assert words.startswith("no recipe named 'lama3.1-8b'. Did you mean llama3.1-8b? These ship: llama3.1-8b, ")
    assert all(name in words for name in recipe.names())


def test_flag_before_the_recipe():
    words = refusal("0.5", "tiny", name="--train.lr")
    assert words == "'--train.lr' stands where the recipe belongs. Write the recipe first, its flags after it."


def test_missing_file():
    words = refusal(name="nowhere/r.toml")
    assert words.startswith("no recipe at nowhere/r.toml. Give the path of a TOML file, or a name: blogcatalog, ")


def test_file_that_is_not_toml(tmp_path):
    path = write(tmp_path / "r.toml", "[run]\ndir = runs/x\n")
    assert refusal(name=path).startswith(f"{path} is not TOML: ")
    assert "line 2" in refusal(name=path)


def test_circle_of_extends(tmp_path):
    write(tmp_path / "a.toml", 'extends = "b.toml"\n')
    path = write(tmp_path / "b.toml", 'extends = "a.toml"\n')
    assert "recipes extend each other in a circle" in refusal(name=path)


def test_extends_that_is_not_text(tmp_path):
    path = write(tmp_path / "r.toml", "extends = 3\n")
    assert refusal(name=path) == f'extends = 3 in {path} is not text. Write extends = "NAME" or a path.'


# --- rules over several settings


def test_sequences_longer_than_the_model_is_meant_for():
    words = refusal("--train.seq_len", "512")
    assert words.startswith("train.seq_len reaches 512, more than model.max_seq_len 256")
    assert "train.seq_len set by flag" in words
    assert "model.max_seq_len set by recipe tiny, line" in words
    assert words.endswith("Shorten the sequences or raise model.max_seq_len.")


def test_a_later_stage_longer_than_the_model_is_meant_for():
    assert "schedule.seq_stages reaches 512" in refusal("--schedule.seq_stages", "[[1024, 512]]")


def test_batch_that_does_not_split():
    words = refusal("--train.batch_tokens", "1000")
    assert "train.batch_tokens: 1000 tokens a step do not split into micro-batches" in words
    assert "seq_len 128 x train.micro_batch 4 x 1 data-parallel ranks = 512 tokens" in words
    assert words.endswith("Make it 1024, or change train.micro_batch.")


def test_later_stage_that_does_not_split():
    assert "schedule.batch_stages: 1100 tokens a step from token 2048" in refusal(
        "--schedule.batch_stages=[[2048, 1100]]"
    )


def test_stage_whose_sequences_do_not_fill_a_micro_batch():
    words = refusal("--schedule.seq_stages", "[[2048, 96]]")
    assert words.startswith(
        "schedule.seq_stages: sequences of 96 tokens from token 2048 on do not fill micro-batches of"
    )
    assert words.endswith("Choose lengths that divide it, or another train.micro_batch.")


def test_batch_that_does_not_split_over_the_ranks():
    with pytest.raises(RecipeError, match="x 4 data-parallel ranks = 2048 tokens"):
        recipe.check_ranks(recipe.load("tiny").recipe, 4)


def test_heads_that_do_not_fill_the_stream():
    words = refusal("--model.dim", "128")
    assert words.startswith("model.num_heads x model.head_dim is 4 x 16 = 64, but model.dim is 128")
    assert words.endswith("Set model.dim to 64, or change the heads.")


def test_groups_of_heads():
    assert "num_heads 4 is not a multiple of num_kv_heads 3" in refusal("--model.num_kv_heads", "3")


def test_stages_out_of_order():
    assert "list the stages in ascending order" in refusal("--schedule.seq_stages", "[[2048, 64], [1024, 128]]").lower()


def test_stage_of_no_size():
    assert "every pair is (from token, size)" in refusal("--schedule.seq_stages", "[[2048, 0]]").lower()


def test_warmup_longer_than_the_run():
    assert "schedule.warmup_tokens 30000 is more than train.tokens 20480" in refusal(
        "--schedule.warmup_tokens", "30000"
    )


def test_evaluation_without_tokens():
    assert "eval.every is set but eval.tokens is 0" in refusal("--eval.every", "3", "--eval.tokens", "0")


# --- a mixture of sources


def test_one_path_is_a_mixture_of_one():
    assert recipe.load("tiny").recipe.data.mixture() == (("runs/shards", 1.0),)


def test_sources_stand_for_path(tmp_path):
    path = write(tmp_path / "r.toml", 'extends = "tiny"\n[data]\nsources = [["a", 3], ["b", 0.5]]\npath = "c"\n')
    loaded = recipe.load(path)
    assert loaded.recipe.data.mixture() == (("a", 3.0), ("b", 0.5))
    assert recipe.load(write(tmp_path / "again.toml", loaded.text)).recipe == loaded.recipe


def test_a_later_layer_that_sets_path_drops_the_sources_of_earlier_ones(tmp_path):
    path = write(tmp_path / "r.toml", 'extends = "tiny"\n[data]\nsources = [["a", 3.0]]\n')
    alone = recipe.load(path, ["--data.path", "c"])
    assert alone.recipe.data.mixture() == (("c", 1.0),)
    assert (alone.origins["data.path"], alone.origins["data.sources"]) == ("flag", "default")
    both = recipe.load(path, ["--data.path", "c", "--data.sources", '[["d", 1]]'])
    assert both.recipe.data.mixture() == (("d", 1.0),)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", '"1"', "true"])
def test_weights_are_numbers_above_zero(weight):
    words = refusal("--data.sources", f'[["a", {weight}]]')
    assert words.startswith("data.sources = [")
    assert words.endswith("(flag) is not allowed. It must be a list of [text, a number, more than 0].")


def test_a_source_that_is_named_twice():
    words = refusal("--data.sources", '[["a", 1], ["b", 1], ["a/", 2]]')
    assert words == (
        "data.sources names a twice (data.sources set by flag). Give every folder once, with its whole weight."
    )


# --- keys that were renamed


@pytest.fixture
def renamed(monkeypatch):
    """`train.learning_rate` and `output.folder` were renamed, `train.rate` longer ago."""
    table = {
        "train.learning_rate": recipe.Renamed("train.lr", "0.3.0"),
        "output.folder": recipe.Renamed("run.dir", "0.3.0"),
        "train.rate": recipe.Renamed("train.lr", "0.2.0"),
    }
    monkeypatch.setattr(recipe, "RENAMED", table)
    monkeypatch.setattr(recipe, "__version__", "0.2.0")


def test_an_old_name_in_a_file_is_taken_and_the_new_one_told(renamed, tmp_path, capsys):
    path = write(tmp_path / "r.toml", 'extends = "tiny"\n[train]\nlearning_rate = 0.5\n[output]\nfolder = "x"\n')
    loaded = recipe.load(path)
    assert (loaded.recipe.train.lr, loaded.recipe.run.dir) == (0.5, "x")
    assert loaded.origins["train.lr"] == f"file {path}"
    assert capsys.readouterr().err.splitlines() == [
        f"file {path}, line 3: train.learning_rate is now train.lr; Puna 0.3.0 will not know train.learning_rate",
        f"file {path}, line 5: output.folder is now run.dir; Puna 0.3.0 will not know output.folder",
    ]
    assert "learning_rate" not in loaded.text


def test_an_old_name_in_a_flag(renamed, capsys):
    loaded = recipe.load("tiny", ["--train.learning_rate", "0.5", "--output.folder", "2026"])
    assert (loaded.recipe.train.lr, loaded.recipe.run.dir) == (0.5, "2026")
    first, _ = capsys.readouterr().err.splitlines()
    assert first == "flag: train.learning_rate is now train.lr; Puna 0.3.0 will not know train.learning_rate"


def test_both_names_in_one_layer(renamed, tmp_path):
    path = write(tmp_path / "r.toml", "[train]\nlr = 0.1\nlearning_rate = 0.5\n")
    assert refusal(name=path) == (
        f"file {path} sets train.lr twice, as train.lr and as train.learning_rate. Keep train.lr alone."
    )
    assert refusal("--output.folder", "a", "--run.dir", "b").startswith("flag sets run.dir twice")


def test_a_later_layer_wins_by_either_name(renamed, tmp_path):
    path = write(tmp_path / "r.toml", 'extends = "tiny"\n[train]\nlearning_rate = 0.5\n')
    assert recipe.load(path, ["--train.lr", "0.25"]).recipe.train.lr == 0.25


def test_after_two_releases_an_old_name_is_unknown(renamed):
    assert refusal("--train.rate", "0.5") == "train.rate: unknown key in flag. It was renamed: write train.lr."


def test_a_wrong_value_under_an_old_name(renamed):
    assert refusal("--train.learning_rate", "fast").startswith('train.lr = "fast" (flag) is not allowed.')
    assert "output = 3 (flag): output is a section" in refusal("--output", "3")


def test_every_renamed_key_leads_to_a_key():
    assert {renamed.key for renamed in recipe.RENAMED.values()} <= set(recipe.keys())
    assert not set(recipe.RENAMED) & set(recipe.keys())


# --- recipes of one's own


@pytest.mark.parametrize("name", recipe.names())
def test_a_starter_is_the_recipe_it_began_from(name, tmp_path):
    recipe.write_starter(name, tmp_path / "own.toml")
    own = recipe.load(tmp_path / "own.toml").recipe
    shipped = recipe.load(name).recipe
    assert recipe.flat(own) == recipe.flat(shipped) | {"run.dir": "runs/own"}


def test_a_starter_explains_each_key(tmp_path):
    recipe.write_starter("tiny", tmp_path / "own.toml")
    text = (tmp_path / "own.toml").read_text(encoding="utf-8")
    assert 'extends = "tiny"\n' in text
    assert "# peak learning rate (a number, more than 0)\nlr = 0.003\n" in text
    assert "# tokens in one sequence (tokens: a whole number, at least 2)\nseq_len = 128\n" in text
    assert max(map(len, text.splitlines())) <= 120
    assert {*recipe.STARTER, *recipe.GRAPH_STARTER} <= set(recipe.keys())


def test_a_starter_does_not_overwrite(tmp_path):
    path = write(tmp_path / "own.toml", "mine")
    with pytest.raises(RecipeError) as caught:
        recipe.write_starter("tiny", path)
    assert str(caught.value) == f"{path} is already there. Name another file with --out, or remove it."
    assert path.read_text() == "mine"


def test_a_starter_of_nothing_that_ships(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe named 'lama' ships\. Begin from one of blogcatalog, demo"):
        recipe.write_starter("lama", tmp_path / "own.toml")
    with pytest.raises(RecipeError, match=r"own does not end in \.toml\. Name it .*own\.toml\."):
        recipe.write_starter("tiny", tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def test_diff_names_key_values_and_layers():
    a, b = recipe.load("tiny"), recipe.load("tiny", ["--train.lr", "0.5", "--data.sources", '[["a", 1]]'])
    assert recipe.diff(a, a) == []
    assert recipe.diff(a, b) == [
        {
            "key": "data.sources",
            "a": {"value": (), "layer": "default"},
            "b": {"value": (("a", 1.0),), "layer": "flag"},
        },
        {
            "key": "train.lr",
            "a": {"value": 0.003, "layer": "recipe tiny"},
            "b": {"value": 0.5, "layer": "flag"},
        },
    ]


def test_diff_where_only_one_has_a_section():
    records = {row["key"]: row for row in recipe.diff(recipe.load("llama3-8b"), recipe.load("llama3.1-8b"))}
    assert records["model.rope_scaling"] == {
        "key": "model.rope_scaling",
        "a": {"value": None, "layer": "default"},
        "b": None,
    }
    assert records["model.rope_scaling.factor"]["a"] is None
    assert records["model.rope_scaling.factor"]["b"]["value"] == 8.0
    rows = recipe.diff_table("llama3-8b", "llama3.1-8b", list(records.values())).splitlines()
    assert rows[0].split() == ["key", "llama3-8b", "layer", "llama3.1-8b", "layer"]
    assert ["model.rope_scaling", '"none"', "default", "-", "-"] in [row.split() for row in rows]
    assert recipe.diff_table("a", "b", []) == "no difference\n"


# --- files that nobody meant


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\ntokens = " + "9" * 30, "train.tokens (file {path}, line 2) is a number of 100 bits. Whole numbers"),
        ("[train]\ntokens = 0x" + "f" * 5000, "train.tokens (file {path}, line 2) is a number of 20000 bits"),
        ("[schedule]\nseq_stages = [[0x" + "f" * 5000 + ", 2]]", "schedule.seq_stages (file {path}, line 2) is a num"),
        ("extends = 0x" + "f" * 5000, "extends (file {path}, line 1) is a number of 20000 bits"),
        ("[train]\ntokens = " + "9" * 5000, "{path} is not TOML: Exceeds the limit"),
        ("[train]\nlr = " + "[" * 5000, "{path} nests brackets too deeply"),
        ("[train]\nlr" + ".a" * 1500 + " = 1", "train.lr = {{...}} (file {path}) is not allowed"),
        ('extends = "' + "a" * 5000 + '"', "no recipe named 'aaaa"),
        ('extends = "a/' + "a" * 5000 + '"', "no recipe at "),
        ('extends = "\\u0000.toml"', "no recipe at "),
        ('extends = ""', "no recipe named ''"),
        ('[train]\nlr = "' + "a" * 5000 + '"', 'train.lr = "aaaa'),
        ("[train]\nlr = 1979-05-27", "train.lr = 1979-05-27 (file {path}, line 2) is not allowed"),
        ("[[train]]\nlr = 1", "train = [{{...}}] (file {path}): train is a section"),
        ("[train]\nlr = nan", "train.lr = nan (file {path}, line 2) is not allowed. It must be a number"),
    ],
)
def test_odd_files_are_refused_in_one_line(tmp_path, text, words):
    path = write(tmp_path / "odd.toml", text)
    said = refusal(name=path)
    assert said.startswith(words.format(path=path))
    assert "\n" not in said


def test_a_circle_by_another_path(tmp_path):
    path = write(tmp_path / "a.toml", f'extends = "../{tmp_path.name}/a.toml"\n')
    assert "recipes extend each other in a circle" in refusal(name=path)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "r.toml", "")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: path.with_name("gone").open().read())
    assert refusal(name=path) == f"{path} cannot be read (No such file or directory). Give a file that can be."


def test_a_flag_with_a_number_of_many_digits():
    assert refusal("--train.tokens", "9" * 5000).startswith('train.tokens = "9999')
    assert "a number of 20000 bits" in refusal("--train.tokens", "0x" + "f" * 5000)


# --- printing


@pytest.mark.parametrize("key", recipe.keys().values(), ids=lambda key: key.name)
def test_every_setting_says_what_it_means(key):
    assert len(key.help.split()) > 1


def test_every_setting_states_its_unit_even_where_it_has_none():
    leaves = [
        field
        for group in [recipe.schema(), *recipe.schema()["$defs"].values()]
        for field in group["properties"].values()
    ]
    values = [field for field in leaves if "default" in field and "$ref" not in str(field)]
    assert len(values) == len(recipe.keys())
    assert all("unit" in field for field in values)


def test_show_has_a_row_for_every_setting():
    rows = recipe.show(recipe.load("llama3.1-8b"))
    assert [row["key"] for row in rows] == list(recipe.keys())
    assert all(set(row) == {"key", "value", "unit", "layer", "help"} for row in rows)


def test_json_of_a_run_directory():
    record = json.loads(recipe.to_json(recipe.load("tiny", ["--run.seed", "5"])))
    assert record["run.seed"] == {"value": 5, "layer": "flag"}
    assert record["train.eps"] == {"value": 1e-8, "layer": "default"}


def test_schema_knows_extends_and_refuses_other_keys():
    found = recipe.schema()
    assert found["properties"]["extends"]["type"] == "string"
    assert found["additionalProperties"] is False


def test_reference_page_is_current():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipe.reference() in page, "write the output of `puna recipe reference` into docs/recipes.md"
