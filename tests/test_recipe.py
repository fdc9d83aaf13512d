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
    assert set(recipe.names()) == {*PUBLISHED, "tiny", "demo"}


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
    assert words.startswith("no recipe at nowhere/r.toml. Give the path of a TOML file, or a name: demo, ")


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
