"""What docs/troubleshooting.md tells people to type is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_verbs import run

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("photos", "model")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_every_command_runs():
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("blip2 ")]
    assert len(commands) >= 6
    for command in commands:
        result = run(*shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0, (command, result.stderr)


def test_every_snippet_runs():
    snippets = blocks("python")
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile("import blip2\nmodel = blip2.load()\n" + snippet, "troubleshooting.md", "exec"), {})


def test_every_benchmark_that_is_named_is_there():
    named = re.findall(r"python -m (benchmarks\.\w+)", TEXT)
    assert "benchmarks.remedies" in named
    assert [name for name in named if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


def test_all_five_troubles_have_a_section():
    assert re.findall(r"^## (.*)$", TEXT, flags=re.MULTILINE) == [
        "Memory runs out",
        "It is slow",
        "Captions are poor",
        "Captions name what is not there",
        "Answers are wrong",
    ]
