"""Published runs: rows become jobs, gaps are filled without looking at the speed, broken rows are named."""

import csv
from pathlib import Path

import pytest

from puna.plan import runs
from puna.plan.runs import RunsError

HEAD = (  # noqa: SIM905
    "id,kind,stack,source,year,model,params_b,layers,hidden,ffn,heads,kv_heads,vocab,seq_len,gpu,gpus,gpus_per_node,"
    "internode_gbps_per_gpu,precision,dp,tp,pp,vp,cp,ep,zero_or_fsdp,global_batch_seqs,micro_batch_seqs,recompute,"
    "attention_impl,tokens_per_s_per_gpu,tflops_per_gpu_reported,mfu_reported_pct,iter_time_s,peak_mem_gb,notes"
).split(",")
ROW = {
    "id": "made-001", "kind": "dense", "stack": "megatron", "model": "Llama3-70B", "layers": "80", "hidden": "8192",
    "ffn": "28672", "heads": "64", "kv_heads": "8", "seq_len": "8192", "gpu": "H100-SXM-80GB", "gpus": "64",
    "gpus_per_node": "8", "precision": "fp8", "dp": "2", "tp": "4", "pp": "8", "global_batch_seqs": "128",
    "micro_batch_seqs": "1", "tokens_per_s_per_gpu": "1600",
}  # fmt: skip


def _read(tmp_path: Path, *rows: dict[str, str]) -> runs.Runs:
    path = tmp_path / "runs.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HEAD)
        writer.writeheader()
        writer.writerows(rows)
    return runs.read(path)


def test_a_row_is_a_job(tmp_path: Path) -> None:
    (run,) = _read(tmp_path, ROW).runs
    layout = run.case.layout
    assert (layout.tp, layout.pp, layout.dp, layout.global_batch, layout.precision) == (4, 8, 2, 128, "fp8")
    assert run.case.model.gated
    assert run.case.model.vocab == 128256
    assert run.seconds == pytest.approx(128 * 8192 / (1600 * 64))
    assert run.source == "made"


def test_an_iteration_time_is_taken_before_a_rate(tmp_path: Path) -> None:
    (run,) = _read(tmp_path, ROW | {"iter_time_s": "9.5"}).runs
    assert run.seconds == 9.5


def test_what_is_imputed_does_not_see_the_speed(tmp_path: Path) -> None:
    fast, slow = (ROW | {"tokens_per_s_per_gpu": rate} for rate in ("9000", "10"))
    one, other = _read(tmp_path, fast, slow).runs
    assert one.case == other.case


def test_recompute_that_is_not_stated_is_the_least_that_fits(tmp_path: Path) -> None:
    small = ROW | {"model": "GPT-1B", "layers": "24", "hidden": "2048", "ffn": "8192", "heads": "16", "kv_heads": "16"}
    tight = small | {"tp": "1", "pp": "1", "dp": "64", "micro_batch_seqs": "64", "global_batch_seqs": "4096"}
    one, other = _read(tmp_path, small, tight).runs
    assert one.case.layout.recompute == "none"
    assert other.case.layout.recompute == "full"
    assert 0 < other.case.layout.recompute_share <= 1


@pytest.mark.parametrize(
    ("changes", "attention", "sharding", "vp"),
    [
        ({}, "cudnn", "zero1", 10),
        ({"gpu": "A100-SXM-80GB", "precision": "bf16"}, "unfused", "none", 1),
        ({"stack": "pytorch-eager"}, "flash", "zero3", 1),
        ({"attention_impl": "flash (triton)", "stack": "pytorch-eager"}, "flash-1", "zero3", 1),
        ({"vp": "5", "zero_or_fsdp": "hsdp"}, "cudnn", "hsdp", 5),
    ],
)
def test_the_rules_for_gaps(tmp_path: Path, changes: dict[str, str], attention: str, sharding: str, vp: int) -> None:
    layout = _read(tmp_path, ROW | changes).runs[0].case.layout
    assert (layout.attention, layout.sharding, layout.vp) == (attention, sharding, vp)


def test_broken_rows_are_named_by_line_and_the_others_used(tmp_path: Path) -> None:
    rows = [
        ROW,
        ROW | {"id": "bad-1", "layers": "many"},
        ROW | {"id": "bad-2", "gpu": "H900"},
        ROW | {"id": "bad-3", "hidden": "-8"},
        ROW | {"id": "bad-4", "recompute": "some"},
        ROW | {"id": "made-002"},
    ]
    found = _read(tmp_path, *rows)
    assert [run.id for run in found.runs] == ["made-001", "made-002"]
    assert found.skipped == {"broken row": 3, "unknown accelerator": 1}
    assert [line.partition(":")[0] for line in found.broken] == [
        "line 3 (bad-1)", "line 4 (bad-2)", "line 5 (bad-3)", "line 6 (bad-4)",
    ]  # fmt: skip
    assert "Did you mean" in found.broken[1]


def test_rows_that_are_no_dense_runs_are_counted(tmp_path: Path) -> None:
    found = _read(tmp_path, ROW, ROW | {"kind": "moe"}, ROW | {"layers": ""}, ROW | {"tokens_per_s_per_gpu": ""})
    assert len(found.runs) == 1
    assert found.skipped == {"kind moe": 1, "incomplete key": 1, "no speed": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": "nan"}, "layers is 'nan'. Give a number"),
        ({"gpus": "inf"}, "gpus is 'inf'"),
        ({"gpus": "0"}, "gpus is 0. Give a whole number from 1"),
        ({"hidden": "1e300"}, "hidden is 1e300"),
        ({"seq_len": "8,192"}, "seq_len is '8,192'"),
        ({"global_batch_seqs": "2.5"}, "global_batch_seqs is 2.5"),
        ({"tokens_per_s_per_gpu": "nan"}, "tokens_per_s_per_gpu is 'nan'"),
        ({"tokens_per_s_per_gpu": "-3"}, "tokens_per_s_per_gpu is -3. Give a number above 0"),
        ({"iter_time_s": "0"}, "iter_time_s is 0"),
        ({"peak_mem_gb": "-1"}, "peak_mem_gb is -1.0"),
        ({"kv_heads": "7"}, "64 heads do not divide among 7"),
        ({"gpu": "A100-SXM-80GB", "precision": "fp8"}, "a100-80 has no fp8 matrix units"),
        ({"precision": "int3"}, "precision is 'int3'. Choose one of nvfp4"),
        ({"zero_or_fsdp": "sometimes"}, "zero_or_fsdp is 'sometimes'. Choose one of none"),
        ({"recompute": "a bit"}, "recompute is 'a bit'. Choose one of none"),
        ({"gpu": ""}, "no accelerator named ''"),
    ],
)
def test_a_row_that_is_no_job_is_left_out_with_the_reason(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    found = _read(tmp_path, ROW, ROW | {"id": "bad-1"} | changes)
    assert [run.id for run in found.runs] == ["made-001"]
    assert sum(found.skipped.values()) == 1
    assert found.broken[0].startswith("line 3 (bad-1): ")
    assert words in found.broken[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stack": "Megatron-Core 0.12"}, {"stack": "megatron"}),
        ({"stack": "MaxText"}, {"stack": "jax-xla"}),
        ({"stack": "torch.compile + FSDP2"}, {"stack": "pytorch-compiled"}),
        ({"stack": "homegrown"}, {"stack": "pytorch-eager", "sharding": "zero3"}),
        ({"zero_or_fsdp": "FSDP", "recompute": "yes"}, {"sharding": "zero3", "recompute": "full"}),
        ({"recompute": "Selective (core attention)"}, {"recompute": "selective"}),
        ({"zero_or_fsdp": "ZeRO-1", "recompute": "False"}, {"sharding": "zero1", "recompute": "none"}),
        ({"zero_or_fsdp": "distributed optimizer"}, {"sharding": "zero1"}),
        ({"precision": "BF16-mixed"}, {"precision": "bf16"}),
        ({"precision": "FP8-CS"}, {"precision": "fp8"}),
        ({"precision": "FP8-MX", "gpu": "GB200"}, {"precision": "mxfp8"}),
    ],
)  # fmt: skip
def test_other_words_for_the_same(tmp_path: Path, changes: dict[str, str], expected: dict[str, str]) -> None:
    (run,) = _read(tmp_path, ROW | changes).runs
    assert {key: getattr(run.case.layout, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("H100 80GB HBM3 (cloud)", "h100-sxm"), ("H800-SXM", "h100-sxm"), ("A800", "a100-80"), ("A100 40GB", "a100-40")],
)
def test_accelerators_by_their_sources_words(tmp_path: Path, name: str, gpu: str) -> None:
    (run,) = _read(tmp_path, ROW | {"gpu": name, "precision": "bf16"}).runs
    assert run.case.cluster.gpu.name == gpu


def test_only_the_key_and_a_speed_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(
        "id,gpu,gpus,layers,hidden,seq_len,tp,pp,global_batch_seqs,iter_time_s\nx-1,H100,8,32,4096,4096,1,1,64,3\n",
        encoding="utf-8",
    )
    (run,) = runs.read(path).runs
    assert (run.case.layout.stack, run.case.layout.sharding, run.case.layout.precision) == (
        "pytorch-eager", "zero3", "bf16",
    )  # fmt: skip
    assert run.seconds == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_as_windows_writes_them(tmp_path: Path, encoding: str, delimiter: str) -> None:
    path = tmp_path / "runs.csv"
    row = {key.upper(): value for key, value in (ROW | {"model": "Modèle Llama3 “70B”"}).items()}
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, row, delimiter=delimiter, lineterminator="\r\n")
        writer.writeheader()
        writer.writerow(row)
    (run,) = runs.read(path).runs
    assert run.case.model.name == "Modèle Llama3 “70B”"
    assert run.case.layout.global_batch == 128


def test_a_memory_without_a_speed_is_kept_apart(tmp_path: Path) -> None:
    silent = ROW | {"tokens_per_s_per_gpu": "", "peak_mem_gb": "61.5", "id": "made-002"}
    found = _read(tmp_path, ROW, silent)
    assert [run.id for run in found.runs] == ["made-001"]
    assert [(run.id, run.memory) for run in found.untimed] == [("made-002", 61.5)]
    assert found.skipped == {"no speed": 1}


def test_a_short_row_and_a_long_one_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    whole = ",".join(ROW.get(key, "") for key in HEAD)
    path.write_text(",".join(HEAD) + f"\nshort,dense\n{whole},,,more\n", encoding="utf-8")
    found = runs.read(path)
    assert len(found.runs) == 1
    assert found.skipped == {"incomplete key": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "has no column id, gpu, layers"),
        (",".join(HEAD).replace("hidden", "width") + "\n", "has no column hidden. Name"),
        ("", "has no column id"),
        ("\x00\x89PNG\r\n\x00\x00", "has no column id"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(RunsError, match=words):
        runs.read(path)
