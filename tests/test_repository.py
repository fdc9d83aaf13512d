"""What the repository says about itself is true."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import puna
from puna import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_OURS = {"runs", "build", "dist"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tree() -> Iterator[str]:
    """Paths of README's annotated tree; a folder ends in a slash."""
    block = re.search(r"<!-- tree.*?```\n(.*?)```", read("README.md"), re.DOTALL)
    assert block, "README.md has no annotated tree"
    parents: list[str] = []
    for line in block[1].splitlines():
        drawing, name, purpose = re.fullmatch(r"([│├└─ ]*)(\S+)\s+(\S.*)", line).groups()
        assert len(purpose.split()) >= 2
        parents = [*parents[: len(drawing) // 4], name]
        yield "".join(parents)


def verbs(group: click.Group, name: str = "puna") -> Iterator[str]:
    for verb, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, f"{name} {verb}")
        else:
            yield f"{name} {verb}"


def sources() -> list[Path]:
    ours = [path for folder in ("puna", "tests", "bench", "docs", ".ci") for path in (ROOT / folder).rglob("*")]
    ours += [path for path in ROOT.iterdir() if path.name not in {".git"}]
    text = {".py", ".md", ".toml", ".txt", ".yaml", ".html", ".js", ".css", ""}
    return [path for path in ours if path.is_file() and path.suffix in text and "__pycache__" not in path.parts]


def test_every_path_of_the_tree_exists():
    for path in tree():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_every_folder_and_top_module_is_in_the_tree():
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in NOT_OURS and path.name[0] != "."]
    rooms = [path.parent for path in (ROOT / "puna").rglob("__init__.py")] + [ROOT / "puna" / "recipes"]
    wanted = {f"{path.relative_to(ROOT)}/" for path in [*folders, *rooms] if path.suffix != ".egg-info"}
    wanted |= {f"puna/{path.name}" for path in (ROOT / "puna").glob("*.py") if path.name != "__init__.py"}
    assert wanted - set(tree()) == set()


def test_the_two_commands_stand_on_the_first_screen():
    screen = "\n".join(read("README.md").splitlines()[:15])
    assert "make demo" in screen
    assert "make test" in screen


@pytest.mark.parametrize("verb", verbs(cli.puna))
def test_every_verb_is_documented(verb):
    words = verb.split()
    lists = "|".join(re.escape(word) for word in words[-1:])
    pattern = rf"{re.escape(' '.join(words[:-1]))} (?:[a-z]+\|)*(?:{lists})\b"
    assert any(re.search(pattern, page.read_text(encoding="utf-8")) for page in PAGES[:1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_parse(page):
    """Each line of a code block that begins with `puna` names a verb and only flags that the verb has."""
    for line in re.findall(r"^(?:\. )?puna (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        command: click.Command = cli.puna
        words = line.split("#")[0].split()
        while isinstance(command, click.Group) and not words[0].startswith("-") and "|" not in words[0]:
            command = command.commands[words.pop(0)]
        known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            assert flag in known or "." in flag or flag == "--version", line


def test_no_page_or_source_knows_a_machine():
    """No path of somebody's home, no conflict mark, no note to self."""
    marks = [r"/(?:home|root|Users|work)/\w", r"^(?:<{7}|>{7}) ", r"\b(?:TO" + "DO|FIX" + r"ME)\b"]
    for path in sources():
        found = re.search("|".join(marks), path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r}"


def test_constraints_pin_exactly_and_name_no_place():
    for line in read("constraints.txt").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_every_dependency_is_pinned():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.match(r"[\w-]+", d)[0].replace("_", "-") for d in wanted} - {"puna"}
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in read("constraints.txt").splitlines()}
    assert names - pinned == set()


def test_a_missing_package_names_an_extra_that_has_it():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for extra, modules in cli.EXTRAS.items():
        assert {module for module in modules if not any(d.startswith(module) for d in extras[extra])} == set()


def test_changelog_and_licence():
    assert re.search(rf"## \[(?:Unreleased|{re.escape(puna.__version__)})\]", read("CHANGELOG.md"))
    assert "Apache License" in read("LICENSE")
    assert "END OF TERMS AND CONDITIONS" in read("LICENSE")
