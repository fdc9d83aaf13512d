"""docs/health.md says what the code does."""

import re
from pathlib import Path

import pytest

from puna.diagnosis.records import STATISTICS
from puna.diagnosis.words import FAMILIES
from puna.train.config import HealthConfig
from puna.train.detector import rules

PAGE = (Path(__file__).parents[2] / "docs" / "health.md").read_text(encoding="utf-8")
NOT_THRESHOLDS = {"enabled", "act", "sample", "record_every", "histogram_every"}


def test_every_threshold_stands_there_with_its_default():
    told = {key: float(value) for key, value in re.findall(r"`(\w+)` = ([\d.]+)", PAGE)}
    assert told == {
        key: float(value) for key, value in HealthConfig().model_dump().items() if key not in NOT_THRESHOLDS
    }


def test_every_rule_stands_there_with_its_state():
    rows = re.findall(r"^\| (\w+) \| .* \| (watch|alarm) \|$", PAGE, re.MULTILINE)
    assert list(dict.fromkeys(name for name, _ in rows)) == [rule.rule for rule in rules(HealthConfig())]
    for rule in rules(HealthConfig()):
        states = {state for name, state in rows if name == rule.rule}
        assert ("alarm" in states) == (rule.alarm is not None)
        assert rule.watch is None or "watch" in states


def test_every_statistic_of_a_rule_has_words():
    assert {rule.statistic for rule in rules(HealthConfig())} <= FAMILIES.keys()


@pytest.mark.parametrize("key", [*STATISTICS, "g_rms", "update_ratio"])
def test_every_statistic_is_explained(key):
    assert f"| `{key}` |" in PAGE
