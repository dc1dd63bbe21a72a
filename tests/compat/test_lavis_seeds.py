"""LAVIS's snippets of the documents, run with the published models at tiny size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import snippets
import torch


@pytest.mark.usefixtures("hub", "photos")
@pytest.mark.parametrize("name", snippets.names("004_lavis*"))
def test_a_snippet_of_lavis_runs(name: str, address: str, capsys: pytest.CaptureFixture[str]):
    left = snippets.run(name, address)
    printed = capsys.readouterr().out
    if name == "004_lavis_caption":
        assert [type(text) for text in left["caption"] + left["answer"]] == [str, str]
    elif name == "004_lavis_matching":
        assert left["itm_output"].shape == (1, 2)
        assert f"Match probability: {left['itm_scores'][0, 1]:.3f}\n" in printed
    elif name == "004_lavis_search":
        assert sorted(path for path, _ in left["results"]) == ["img1.jpg", "img2.jpg", "img3.jpg"]
        assert [score for _, score in left["results"]] == sorted((s for _, s in left["results"]), reverse=True)
    else:
        assert left["features"].image_embeds.shape == (1, 4, 16)
        torch.testing.assert_close(left["features"].image_embeds_proj.norm(dim=-1), torch.ones(1, 4))
        assert left["features"].text_embeds is None, "the document's own call asks for the image's features alone"


@pytest.mark.usefixtures("hub", "photos")
def test_the_page_s_own_lines_run():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n([^`]*compat\.lavis[^`]*)```", page)
    assert code is not None
    left: dict[str, Any] = {}
    exec(compile(code[1], "compatibility.md", "exec"), left)
    assert left["model"].core.config.language.kind == "opt"
