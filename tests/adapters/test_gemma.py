"""The real language model of the extra `mini`; the first run converts it into the user's cache."""

from __future__ import annotations

import heapq
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2 import adapters
from blip2.adapters import gemma
from blip2.adapters.efficientnet import class_names
from blip2.adapters.parts import fingerprint, require
from blip2.config import PartConfig
from blip2.errors import CheckpointError, MissingExtraError
from blip2.model.gemma import Gemma, sees_all
from blip2.text import Tokenizer
from blip2.weights.maps import transformers as maps
from blip2.weights.rules import for_layers, to_theirs

PART = PartConfig(gemma.NAME, width=640)
SENTENCES = [
    f"A {name} stands beside {count} others; isn't it new?\n" for count, name in enumerate(class_names()[:300])
]


@pytest.fixture(scope="module")
def parts() -> tuple[Gemma, Tokenizer]:
    return adapters.language_model(PART)


def test_it_writes_sensible_english(parts: tuple[Gemma, Tokenizer]) -> None:
    language, tokenizer = parts
    assert tokenizer.bos is not None
    (prompt,) = tokenizer.encode(["The quick brown fox jumps over the"])
    ids = torch.tensor([[tokenizer.bos, *prompt]])
    prefix = language.embed(ids)
    with torch.inference_mode():
        logits, cache = language.prefill(prefix, torch.tensor([ids.shape[1]]))
        written = [logits.argmax(-1)]
        for _ in range(2):
            written.append(language.step(written[-1], cache).argmax(-1))
    assert tokenizer.decode([int(token) for token in written]) == " lazy dog."


def test_its_sizes_are_those_of_gemma_3_270m(parts: tuple[Gemma, Tokenizer]) -> None:
    language, tokenizer = parts
    assert sum(parameter.numel() for parameter in language.parameters()) == 268_098_176
    assert (language.width, language.vocab_size, language.context) == (640, 262_144, 32_768)
    assert {parameter.dtype for parameter in language.parameters()} == {torch.float32}
    assert [layer for layer in range(18) if sees_all(language.config, layer)] == [5, 11, 17]
    assert (tokenizer.bos, tokenizer.pad, tokenizer.stop_ids[:2]) == (2, 0, (1, 106))
    assert tokenizer.rust.token_to_id("<end_of_turn>") == 106


@torch.inference_mode()
def test_it_gives_the_logits_of_transformers(parts: tuple[Gemma, Tokenizer]) -> None:
    language, tokenizer = parts
    transformers: Any = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.Gemma3ForCausalLM(_theirs(transformers, language))
    rules = for_layers(maps.gemma(language.config), range(language.config.layers))
    theirs.load_state_dict(to_theirs(rules, language.state_dict(), "test"), assign=True, strict=False)
    theirs.tie_weights()
    rope = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rope)(theirs.config)  # its frequencies are computed, not loaded
    theirs.model.embed_tokens.embed_scale = torch.tensor(640**0.5)
    ids = torch.tensor([[2, *tokenizer.encode([" ".join(SENTENCES[:60])])[0]]])[:, :600]  # more than its window of 512
    expected = theirs(ids).logits[0, -1]
    found, _ = language.prefill(language.embed(ids), torch.tensor([ids.shape[1]]))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=2e-4)  # logits reach 20; sums in another order


def _theirs(transformers: Any, language: Gemma) -> Any:
    config = language.config
    return transformers.Gemma3TextConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.key_heads,
        head_dim=config.head_width, query_pre_attn_scalar=config.query_scale, sliding_window=config.window,
        max_position_embeddings=config.context,
    )  # fmt: skip


def test_the_converted_model_is_mapped_not_read(parts: tuple[Gemma, Tokenizer]) -> None:
    start = parts[0].words.weight.data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped where")
    ranges = [line.split() for line in maps.read_text().splitlines() if line.endswith("model.safetensors")]
    bounds = [[int(end, 16) for end in fields[0].split("-")] for fields in ranges]
    assert any(low <= start < high for low, high in bounds)


@pytest.mark.usefixtures("parts")  # it is converted by then
def test_a_converted_model_loads_without_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = sys.modules
    for name in [name for name in modules if name.split(".")[0] == "gguf"]:
        monkeypatch.delitem(modules, name)
    monkeypatch.setitem(modules, "gguf", None)
    gemma.load()


@pytest.mark.usefixtures("parts")
def test_mini_loads_without_what_takes_seconds_to_import() -> None:
    code = "import sys, blip2; blip2.load(); print({'transformers', 'gguf', 'torch._dynamo'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


@pytest.mark.parametrize("package", [gemma.PACKAGE, f"{gemma.PACKAGE}_part4", "gguf", "transformers"])
def test_converting_without_a_package_says_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: dict[str, Any] = sys.modules
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path))
    monkeypatch.setitem(modules, package, None)
    with pytest.raises(MissingExtraError, match=r"gemma-3-270m needs .*blip2\[mini\]"):
        gemma.load()


def test_a_damaged_chunk_is_an_error_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = require(gemma.PACKAGE, gemma.NAME)
    chunk = tmp_path / "chunk"
    chunk.write_bytes(b"GGUF")
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package, "chunk_paths", lambda: [chunk])
    with pytest.raises(CheckpointError, match=r"chunks are damaged, reinstall .*gemma3_270m"):
        gemma.load()
    monkeypatch.setattr(package, "chunk_paths", lambda: [tmp_path / "gone"])
    with pytest.raises(CheckpointError, match="a chunk cannot be read, reinstall"):
        gemma.load()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_sentences_come_back_from_their_tokens(parts: tuple[Gemma, Tokenizer]) -> None:
    tokenizer = parts[1]
    rows = tokenizer.encode(SENTENCES)
    assert [tokenizer.decode(row) for row in rows] == SENTENCES
    assert sum(map(len, rows)) < 20 * len(rows)  # words, not letters


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[▁"), max_size=30))
def test_any_text_comes_back_from_its_tokens(parts: tuple[Gemma, Tokenizer], text: str) -> None:
    tokenizer = parts[1]
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


@pytest.mark.slow
def test_converted_anew_it_is_the_same_and_tokenises_as_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[Gemma, Tokenizer]
) -> None:
    """A minute or two. The oracle of the tokenizer is SentencePiece's rule over the scores in the GGUF."""
    kept = gemma._converted()
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path))
    anew = gemma._converted()
    for name in ("model.safetensors", "tokenizer.json", "spelling.json", "config.json"):
        assert fingerprint([anew / name]) == fingerprint([kept / name])
    gemma._assemble(tmp_path / "source.gguf")
    reader = require("gguf", "the test").GGUFReader(tmp_path / "source.gguf")
    words, scores = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "scores"))
    table = {word: (index, scores[index]) for index, word in enumerate(words)}
    for sentence, row in zip(SENTENCES, parts[1].encode(SENTENCES), strict=True):
        assert row == _merge_best_first(sentence.replace(" ", "▁"), table)


def _merge_best_first(text: str, table: dict[str, tuple[int, float]]) -> list[int]:
    """The adjacent pair whose union scores best is merged, the leftmost of equals, until none is a word."""
    pieces: list[str | None] = list(text)

    def following(start: int) -> int | None:
        return next((index for index in range(start + 1, len(pieces)) if pieces[index] is not None), None)

    queue: list[tuple[float, int, str]] = []

    def offer(left: int | None) -> None:
        if left is not None and (right := following(left)) is not None:
            union = f"{pieces[left]}{pieces[right]}"
            if union in table:
                heapq.heappush(queue, (-table[union][1], left, union))

    for start in range(len(pieces)):
        offer(start)
    while queue:
        _, left, union = heapq.heappop(queue)
        right = following(left)
        if pieces[left] is None or right is None or f"{pieces[left]}{pieces[right]}" != union:
            continue
        pieces[left], pieces[right] = union, None
        offer(left)
        offer(next((index for index in range(left - 1, -1, -1) if pieces[index] is not None), None))
    return [table[piece][0] for piece in pieces if piece is not None]


def test_a_text_ends_with_its_line(parts: tuple[Gemma, Tokenizer]) -> None:
    tokenizer = parts[1]
    lines = [tokenizer.encode(["\n" * count])[0] for count in (1, 2, 5, 31)]
    assert all(len(ids) == 1 and ids[0] in tokenizer.stop_ids for ids in lines)
    assert tokenizer.rust.token_to_id("<start_of_image>") in tokenizer.stop_ids
    assert not set(tokenizer.encode(["a dog runs on the beach."])[0]) & set(tokenizer.stop_ids)


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, 300_000), st.integers(0, 400), st.integers(236_700, 262_143)), max_size=20)
)
def test_tokens_are_spelled_as_the_whole_tokenizer_spells_them(parts: tuple[Gemma, Tokenizer], ids: list[int]) -> None:
    tokenizer = parts[1]
    assert tokenizer.decode(ids) == tokenizer.rust.decode(ids, skip_special_tokens=True)


def test_nothing_of_the_tokenizer_is_read_for_texts_without_words() -> None:
    _, tokenizer = adapters.language_model(PART)
    assert tokenizer.prompts(["", ""]) == [[], []]
    assert tokenizer.decode([9259, 563, 1]) == "Hello is"
    assert "_rust" not in vars(tokenizer.rust)  # it takes a second
    assert tokenizer.encode([" dog"]) != [[]]
    assert "_rust" in vars(tokenizer.rust)
