"""Who is to blame: verdicts and pages, from what the ranks say of themselves."""

from typing import Any

import pytest

from puna.errors import Hung, PunaError, RankFailed
from puna.train.flight import Call
from puna.train.hang import Witness, deadlocked, judge, page


def calls(*names: str, first: int = 1, group: str = "default_pg (0)", waits: bool = True) -> list[Call]:
    """One call a name, numbered; the last one waits."""
    numbered = list(enumerate(names, first))
    return [Call(group, number, name, waits and number == numbered[-1][0]) for number, name in numbered]


def rank(number: int, made: list[Call] | None = None, condition: Any = "running", **more: Any) -> Witness:
    given = {"phase": "forward/backward", "unit": 6, "seconds": 9.0} | more
    return Witness(number, "trainer", "box", 100 + number, condition, calls=made or [], **given)


SAME = calls("all_reduce", "all_gather")
CASES: dict[str, tuple[list[Witness], tuple[int, ...], type[PunaError], str]] = {
    "another operation": (
        [rank(0, SAME), rank(1, calls("all_gather", "all_reduce")), rank(2, SAME)],
        (1,),
        Hung,
        "rank 1 (trainer, process 101 on box) made all_gather (call 1 of default_pg (0)), in forward/backward, step 7; "
        "ranks 0, 2 made all_reduce (call 1 of default_pg (0))",
    ),
    "of two, the one ahead": (
        [rank(0, calls("barrier")), rank(1, calls("all_gather"), unit=7)],
        (1,),
        Hung,
        "rank 1 (trainer, process 101 on box) made all_gather",
    ),
    "of two at the same step, both": (
        [rank(0, calls("barrier")), rank(1, calls("all_gather"))],
        (0, 1),
        Hung,
        "rank 0 (trainer, process 100 on box) made barrier",
    ),
    "another group": (
        [
            rank(0, SAME),
            rank(1, calls("all_reduce", waits=False) + calls("all_gather", group="shard (3)")),
            rank(2, SAME),
        ],
        (1,),
        Hung,
        "rank 1 (trainer, process 101 on box) made all_gather (call 1 of shard (3))",
    ),
    "a record that begins later": ([rank(0, SAME), rank(1, SAME[1:]), rank(2, SAME)], (), Hung, "no rank differs"),
    "stopped": (
        [rank(0, SAME), rank(1, condition="stopped", phase="data wait")],
        (1,),
        Hung,
        "data wait, step 7 for 9 s",
    ),
    "dead": ([rank(0, SAME), rank(1, condition="dead")], (1,), RankFailed, "rank 1 (trainer, process 101 on box) died"),
    "silent": ([rank(0, SAME), rank(1, condition="silent")], (1,), Hung, "says nothing any more"),
    "dead because another one differs": (
        [rank(0, SAME), rank(1, condition="dead"), rank(2, calls("barrier", "all_gather"), unit=7)],
        (2,),
        Hung,
        "rank 2 (trainer, process 102 on box) made barrier",
    ),
    "failed": ([rank(0, SAME), rank(1, SAME[:1], "failed", error="KeyError: 'x'")], (1,), RankFailed, "KeyError: 'x'"),
    "ended": ([rank(0, SAME), rank(1, condition="ended")], (1,), Hung, "has ended in good order"),
    "a mistake of one": (
        [rank(0, SAME, "failed", error="lost"), rank(1, condition="ended", error="DataError: x")],
        (1,),
        Hung,
        "has ended (DataError: x)",
    ),
    "elsewhere": ([rank(0, SAME), rank(1, phase="data wait"), rank(2, SAME)], (1,), Hung, "has been in data wait"),
    "alone": ([rank(0, phase="data wait")], (0,), Hung, "has been in data wait, step 7 for 9 s"),
    "behind": (
        [rank(0, SAME), rank(1, [Call("default_pg (0)", 1, "all_reduce", True)]), rank(2, SAME)],
        (1,),
        Hung,
        "rank 1",
    ),
    "nobody waits": ([rank(0), rank(1)], (), Hung, "no rank differs from the others"),
}


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str) -> None:
    witnesses, guilty, kind, words = CASES[name]
    verdict = judge(witnesses)
    assert verdict.guilty == guilty
    assert type(verdict.error) is kind
    assert words in str(verdict.error)


def test_only_ranks_that_can_never_meet_are_a_proof() -> None:
    assert deadlocked([rank(0, SAME), rank(1, calls("all_gather", "all_reduce"))])
    assert not deadlocked([rank(0, SAME), rank(1, SAME)]), "a slow exchange"
    assert not deadlocked([rank(0, SAME), rank(1)]), "a rank that computes may come yet"
    assert not deadlocked([rank(0, SAME), rank(1, calls("all_reduce", "all_gather", waits=False))])


def test_a_page_names_the_guilty_first_and_says_the_same_thing_once() -> None:
    witnesses = [rank(i, SAME, stacks="MainThread\n  a.py:1 f", samples=[i]) for i in range(40)]
    witnesses[30] = rank(30, condition="stopped", phase="data wait", stacks="", samples=[3, 4])
    verdict = judge(witnesses)
    text = page(verdict, witnesses, "runs/x, 40 ranks")
    lines = text.splitlines()
    assert lines[0] == "runs/x, 40 ranks"
    assert lines[2] == str(verdict.error)
    assert lines[5].startswith(">  30    trainer  box   130      stopped    7     9.0      data wait")
    assert "... and 24 more ranks" in lines
    assert text.count("a.py:1 f") == 1
    assert "rank 30:\n    3, 4" in text
    assert "all_gather (call 2 of default_pg (0)) WAITS" in text
    assert len(lines) < 80
