"""A run beside its prediction."""

import json
from pathlib import Path

import pytest

from puna.plan import compare, hardware, workload
from puna.plan.constants import load
from puna.plan.layout import Case, Layout
from puna.plan.workload import PlanError

CASE = Case(workload.find("gpt-125m"), hardware.cluster("a100-80", 1), Layout(global_batch=8, sharding="none"))


def _run(folder: Path, *steps: float) -> Path:
    events = [
        {"event": "step", "step": i + 1, "step_s": s, "peak_memory_bytes": 5e9, "loss": 1.0}
        for i, s in enumerate(steps)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return folder


def test_the_first_step_does_not_count(tmp_path: Path) -> None:
    told = compare.compare(CASE, _run(tmp_path, 90.0, 0.5, 0.4, 0.6), load())
    assert told["measured_s"] == 0.5
    assert told["error"] == pytest.approx(told["predicted_s"] / 0.5 - 1)
    assert told["measured_gb"] == 5.0


def test_a_run_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="fewer than two steps"):
        compare.compare(CASE, _run(tmp_path, 90.0), load())
