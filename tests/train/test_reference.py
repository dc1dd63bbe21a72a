"""docs/recipes.md is what the code says."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from blip2.train.recipe import Recipe  # pyright: ignore[reportPrivateUsage]
from blip2.train.recipe import _sections as sections
from blip2.train.reference import SECTIONS, entries, page, told

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs-recipes`"


@pytest.mark.parametrize("section", SECTIONS.values())
def test_every_key_is_told_once(section: type[BaseModel]):
    names = [name for names, _ in told(section.__doc__ or "") for name in names]
    assert sorted(names) == sorted(info.alias or name for name, info in section.model_fields.items())
    assert all(text for _, _, text in entries(section))


def test_a_key_that_is_not_told_is_an_error():
    class Untold(Recipe):
        """A run.

        Attributes:
            stage: 1 or 2.
        """

    with pytest.raises(ValueError, match="Untold does not tell its fields output, data, steps"):
        entries(Untold)


def test_every_section_of_a_recipe_is_told():
    named = {section for info in Recipe.model_fields.values() for section in sections(info.annotation)}
    assert named <= set(SECTIONS.values())
