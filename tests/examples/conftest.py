"""What the tests of `mini`'s data share: a small database of nouns."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mini"))

from wordnet import WordNet

# noun, its synonyms, and what it is a kind of
NOUNS = {
    "thing": ([], None),
    "animal": ([], "thing"),
    "dog": (["domestic_dog"], "animal"),
    "puppy": ([], "dog"),
    "frog": (["toad_frog"], "animal"),
    "goose": ([], "animal"),
    "lion": ([], "animal"),
    "bunny": (["rabbit"], "animal"),
    "rabbit": (["bunny"], "animal"),
    "apple": ([], "thing"),
    "cherry": ([], "thing"),
    "key": ([], "thing"),
    "hammer": ([], "thing"),
    "scissors": (["pair_of_scissors"], "thing"),
    "flower": ([], "thing"),
    "rose": ([], "flower"),
    "pair": ([], "thing"),
    "party": ([], "thing"),
    "toilet": ([], "thing"),
}


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> WordNet:
    """A small database in WordNet's own format."""
    root = tmp_path_factory.mktemp("wordnet")
    synsets: dict[frozenset[str], int] = {}
    data = b"  1 licence\n"
    index: dict[str, int] = {}
    for noun, (synonyms, above) in NOUNS.items():
        words = frozenset([noun, *synonyms])
        if words not in synsets:
            synsets[words] = len(data)
            pointers = f"001 @ {index[above]:08d} n 0000" if above else "000"
            listed = " ".join(f"{word} 0" for word in (noun, *synonyms))
            data += f"{len(data):08d} 03 n {len(words):02x} {listed} {pointers} | a gloss\n".encode()
        for word in words:
            index.setdefault(word, synsets[words])
    (root / "data.noun").write_bytes(data)
    lines = [f"{word} n 1 1 @ 1 0 {offset:08d}  " for word, offset in sorted(index.items())]
    (root / "index.noun").write_text("\n".join(["  1 licence", *lines]) + "\n")
    (root / "noun.exc").write_text("geese goose\n")
    return WordNet(root)
