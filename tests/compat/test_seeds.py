"""Every snippet that people copy is the document's, and runs after its import line, address and device are changed."""

from __future__ import annotations

import pytest
import snippets
import torch


@pytest.mark.parametrize("name", snippets.names())
def test_a_snippet_is_the_document_s_lines_but_for_white_space_and_listed_repairs(name: str):
    assert snippets.place(name) is not None, "its lines are those of no snippet of the document"


def test_no_repair_is_listed_that_is_not_made():
    for name, repairs in snippets.REPAIRS.items():
        document = [line for block in snippets.blocks(name[:3]) for line in block]
        for theirs, ours in repairs:
            assert not theirs or theirs in document
            assert not ours or ours in snippets.lines(snippets.source(name))


@pytest.mark.parametrize("document", ["000", "003", "004"])
def test_no_snippet_of_the_documents_is_left_out(document: str):
    found = [snippets.place(name) for name in snippets.names(f"{document}_*")]
    missing = [block for number, block in enumerate(snippets.blocks(document)) if number not in found]
    assert [block[0] for block in missing] == []


RUN = [*snippets.names("000_*"), *snippets.names("003_*"), *snippets.names("004_transformers_*")]


@pytest.mark.usefixtures("hub", "photos")
@pytest.mark.parametrize("name", RUN)
def test_a_snippet_runs(name: str, address: str, capsys: pytest.CaptureFixture[str]):
    left = snippets.run(name, address)
    printed = capsys.readouterr().out
    if not name.startswith("004"):
        assert printed.count("\n") == 1
        assert isinstance(left["out"], torch.Tensor)
    if "generated_ids" in left:
        assert left["generated_ids"].dtype == torch.int64
