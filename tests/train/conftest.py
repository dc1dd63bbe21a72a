"""What runs learn from, and what fine-tuning starts from."""

from __future__ import annotations

from pathlib import Path

import fine
import pytest
import tiny


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures, for runs that need not learn."""
    return tiny.draw_shapes(tmp_path_factory.mktemp("shapes"), 32, seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of pictures of one colour each."""
    return fine.pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module", params=["opt", "t5"])
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model of each kind that writes."""
    return fine.model(request.param, tmp_path_factory.mktemp(request.param) / "start")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model whose language model is an OPT."""
    return fine.model("opt", tmp_path_factory.mktemp("opt") / "start")
