"""What the README shows is run: its Python, its commands, its recipes."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_verbs import run

from blip2.blip2 import Blip2
from blip2.train.recipe import Recipe, read

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("photos")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def recipes() -> dict[str, str]:
    """Text of each recipe by the file name in its first line."""
    return {text.splitlines()[0].removeprefix("# "): text for text in blocks("yaml")}


def session() -> Iterator[tuple[list[str], str]]:
    """The commands that are shown with their output."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            yield shlex.split(line)[1:], output


def commands(text: str = README) -> Iterator[list[str]]:
    """The commands that are shown without output, patterns filled in as a shell would."""
    for block in blocks("sh", text):
        for line in block.splitlines():
            if line.startswith("blip2 "):
                words = shlex.split(line, comments=True)[1:]
                yield [
                    found
                    for word in words
                    for found in (sorted(map(str, Path().glob(word))) or [word] if "*" in word else [word])
                ]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that `blip2 train` was given; the training itself has its own tests."""
    seen: list[Recipe] = []

    def train(recipe: Recipe) -> SimpleNamespace:
        seen.append(recipe)
        return SimpleNamespace(model=recipe.output / "model")

    monkeypatch.setattr("blip2.train.loop.train", train)
    return seen


@pytest.fixture
def readers_folder(photos: Path) -> Path:
    """What the README takes for granted around its commands."""
    shutil.copytree(ROOT / "docs", photos / "docs")
    for name, text in recipes().items():
        (photos / name).write_text(text)
    return photos


@pytest.mark.usefixtures("model", "readers_folder")
def test_every_command_runs(trained: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    shown = [*(words for words, _ in session()), *commands()]
    assert len(shown) > 10
    for words in shown:
        result = run(*words, typed="what is this?\n")
        assert result.exit_code == 0, (words, result.stderr)
    assert [recipe.stage for recipe in trained] == [1, 2]


@pytest.mark.usefixtures("model")
def test_every_python_snippet_runs():
    snippets = blocks("python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_every_recipe_has_about_ten_lines_and_is_valid(tmp_path: Path):
    found = recipes()
    assert set(found) == {"stage1.yaml", "stage2.yaml"}
    for name, text in found.items():
        assert len(text.splitlines()) <= 11  # ten and the name
        (tmp_path / name).write_text(text)
        read(tmp_path / name, [])


def test_every_link_leads_to_a_file():
    linked = re.findall(r"(?:\]\(|src=\")(?!https?://)([^)#\"]+)", README)
    assert "docs/camera.jpg" in linked
    missing = [place for place in linked if not (ROOT / place).exists()]
    assert missing == []


@pytest.mark.slow
@pytest.mark.usefixtures("readers_folder")
def test_mini_says_what_the_readme_shows():
    for words, output in session():
        assert run(*words).stdout == output, words


@pytest.mark.slow
@pytest.mark.usefixtures("readers_folder")
def test_the_snippets_run_with_mini():
    for snippet in blocks("python"):
        values: dict[str, object] = {}
        exec(compile(snippet, "README.md", "exec"), values)
        assert isinstance(values["model"], Blip2)
