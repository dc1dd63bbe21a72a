"""What docs/matching.md tells people to type is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_verbs import run

TEXT = (Path(__file__).parents[2] / "docs" / "matching.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("photos", "model")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_every_command_runs():
    Path("photos.csv").write_text("image,caption\nphoto.jpg,a dog runs\nholiday/a.jpg,the beach\n")
    commands = [shlex.split(line)[1:] for block in blocks("sh") for line in block.splitlines()]
    assert {words[0] for words in commands} == {"match", "calibrate", "classify", "caption", "filter"}
    for words in commands:
        if words[0] != "calibrate":  # of Flickr8k; tests/cli/test_calibrate.py runs it on pictures of its own
            assert run(*words).exit_code == 0, words


def test_every_snippet_runs():
    for snippet in blocks("python"):
        exec(compile("import blip2\nmodel = blip2.load()\n" + snippet, "matching.md", "exec"), {})
