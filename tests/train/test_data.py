"""Which samples a step draws, and what becomes of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from blip2.config import PromptConfig
from blip2.data.sources import ImageRef, Prototype, Sample
from blip2.errors import DataError
from blip2.text import Tokenizer, plain
from blip2.train.data import Batches, Draw, Mixture, Texts

WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "<stop>",
    "[UNK]",
    *(f"w{n}" for n in range(40)),
    "Question",
    "Answer",
    ":",
    "?",
    "a",
]


def make_samples(count: int, captions: int = 2, questions: int = 0, prefix: str = "s") -> list[Sample]:
    return [
        Sample(
            f"{prefix}{n}",
            ImageRef(Path(f"{prefix}{n}.jpg")),
            tuple(f"{prefix}{n} caption {c}" for c in range(captions)),
            tuple((f"q{q}?", f"a{q}") for q in range(questions)),
        )
        for n in range(count)
    ]


def word_level(frame: tuple[int, int] | None) -> Tokenizer:
    rust = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(rust, bos=None, pad=0, stop_ids=(3,), frame=frame)


QFORMER, LANGUAGE = word_level((1, 2)), word_level(None)


def spaced() -> Tokenizer:
    """Byte-level, so that a word with a space before it has other ids than one without."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: n for n, letter in enumerate(sorted(alphabet))} | {"<stop>": 256}
    rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(rust, bos=None, pad=0, stop_ids=(256,))


def rows_and_views(rows: Sequence[int], views: Sequence[int]) -> Tensor:
    """Images that say where they come from: [row, view] in each patch."""
    return torch.tensor([[[row, view]] * 3 for row, view in zip(rows, views, strict=True)], dtype=torch.float16)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.25, 1.0, 3.0]), min_size=4, max_size=4),
    batch=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_each_sample_comes_once_an_epoch(sizes: list[int], weights: list[float], batch: int, seed: int):
    sources = [(make_samples(size), weight) for size, weight in zip(sizes, weights, strict=False)]
    mixture = Mixture(sources, seed)
    drawn: list[list[int]] = [[] for _ in sizes]
    for step in range(40):
        for draw in sorted(mixture.draw(step, batch), key=lambda draw: draw.source):
            drawn[draw.source].append(draw.sample)
    for size, samples in zip(sizes, drawn, strict=True):
        counts = Counter(samples)
        epochs, rest = divmod(len(samples), size)
        # the order within a batch is mixed, so that a batch on the border of two epochs may lend a sample to either
        assert min(counts[n] for n in range(size)) >= epochs - 1
        assert max(counts.values(), default=0) <= epochs + 1 + (rest > 0)
        if batch == 1:
            for epoch in range(epochs):
                assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(size=st.integers(1, 40), other=st.integers(1, 40), batch=st.integers(1, 24), seed=st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_no_batch_has_a_sample_twice_unless_its_source_is_too_small(size: int, other: int, batch: int, seed: int):
    mixture = Mixture([(make_samples(size), 3.0), (make_samples(other), 1.0)], seed)
    for step in range(30):
        draws = mixture.draw(step, batch)
        assert len(draws) == batch
        for source, count in ((0, size), (1, other)):
            samples = [draw.sample for draw in draws if draw.source == source]
            assert len(set(samples)) == min(len(samples), count)


@given(steps=st.lists(st.integers(0, 60), min_size=1, max_size=8), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_step_draws_the_same_whatever_was_drawn_before(steps: list[int], seed: int):
    def make() -> Mixture:
        return Mixture([(make_samples(7, questions=3), 1.0), (make_samples(23), 2.0)], seed, questions=0.4, views=3)

    used = make()
    assert [used.draw(step, 6) for step in steps] == [make().draw(step, 6) for step in steps]


def test_draws_do_not_change_from_release_to_release():
    mixture = Mixture([(make_samples(5), 1.0), (make_samples(9), 2.0)], seed=1, views=2)
    drawn = [(draw.source, draw.sample, draw.caption, draw.view) for draw in mixture.draw(3, 4)]
    assert drawn == [(0, 1, 0, 0), (1, 0, 1, 0), (1, 4, 1, 0), (1, 8, 1, 1)]


@pytest.mark.parametrize("batch", [4, 5, 64])
def test_weights_are_shares_of_every_batch(batch: int):
    mixture = Mixture([(make_samples(100), 75), (make_samples(100), 13), (make_samples(100), 12)], seed=0)
    total = Counter[int]()
    for step in range(50):
        counts = Counter(draw.source for draw in mixture.draw(step, batch))
        for source, share in enumerate((0.75, 0.13, 0.12)):
            assert abs(counts[source] - batch * share) <= 1 + source
        total += counts
    for source, share in enumerate((0.75, 0.13, 0.12)):
        assert abs(total[source] - 50 * batch * share) <= 1 + source


def test_all_captions_of_a_sample_come_before_one_comes_again():
    mixture = Mixture([(make_samples(6, captions=5), 1.0)], seed=0)
    seen: dict[int, list[int | None]] = {}
    for step in range(10):
        for draw in mixture.draw(step, 6):
            seen.setdefault(draw.sample, []).append(draw.caption)
    assert all(sorted(map(int, captions[:5])) == list(range(5)) for captions in seen.values() if None not in captions)
    assert len({tuple(captions) for captions in seen.values()}) > 1


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_questions_holds_for_samples_that_have_them(share: float):
    samples = [*make_samples(200, questions=4), *make_samples(200, prefix="t")]
    mixture = Mixture([(samples, 1.0)], seed=0, questions=share)
    draws = [draw for step in range(40) for draw in mixture.draw(step, 20)]
    asked = [bool(draw.questions) for draw in draws if draw.sample < 200]
    assert abs(sum(asked) / len(asked) - share) <= (0.08 if 0 < share < 1 else 0)
    assert not any(draw.questions for draw in draws if draw.sample >= 200)


def test_a_sample_with_questions_only_always_asks_one():
    mixture = Mixture([(make_samples(4, captions=0, questions=2), 1.0)], seed=0)
    assert all(draw.questions in ((0,), (1,)) and draw.caption is None for draw in mixture.draw(0, 4))


def test_several_texts_of_a_picture_are_distinct_captions_and_questions_of_every_kind():
    asked = ("how many dogs?", "how many cats?", "how many men?", "what color is it?", "is it day?", "is it new?")
    sample = Sample("s", ImageRef(Path("s")), ("a", "b", "c"), tuple((question, "yes") for question in asked))
    few = Sample("t", ImageRef(Path("t")), ("a",))
    kinds: Counter[str] = Counter()
    for seed in range(300):
        mixture = Mixture([([sample, few], 1.0)], seed, questions=0.5, texts=4)
        one, other = sorted(mixture.draw(0, 2), key=lambda draw: draw.sample)
        assert len(one.captions) + len(one.questions) <= 4
        assert len({*one.captions}) == len(one.captions) == min(4 - len(one.questions), 3)
        assert one.captions[:1] in ((), (one.caption,))
        named = [" ".join(asked[place].split()[:2]) for place in one.questions]
        assert len(set(named)) == min(len(named), 3)  # there are three kinds
        kinds.update(named[:1])
        assert (other.captions, other.questions) == ((0,), ())
    assert all(kinds[kind] / kinds.total() == pytest.approx(1 / 3, abs=0.1) for kind in kinds)


def test_views_are_drawn_evenly_and_a_prototype_has_another_each_epoch():
    classes = [Sample(f"c{n}", Prototype(n), ("a thing",)) for n in range(50)]
    mixture = Mixture([(make_samples(300), 1.0), (classes, 1.0)], seed=0, views=3)
    draws = [draw for step in range(30) for draw in mixture.draw(step, 20)]
    pictures = Counter(draw.view for draw in draws if draw.source == 0)
    assert all(pictures[view] == pytest.approx(100, abs=30) for view in range(3))
    prototypes = [(draw.sample, draw.view) for draw in draws if draw.source == 1]
    assert len(set(prototypes)) == len(prototypes) == 300
    assert {view for _, view in prototypes} == set(range(6))


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        ([], {}, "at least one source"),
        ([([], 1.0)], {}, "source 0 of the mixture has no samples"),
        ([(make_samples(1), 0.0)], {}, "its weight must be above 0"),
        ([(make_samples(1), float("nan"))], {}, "its weight must be above 0"),
        ([(make_samples(1), 1.0)], {"questions": 1.5}, "share of questions"),
        ([(make_samples(1), 1.0)], {"views": 0}, "at least one view"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(sources: list[tuple[list[Sample], float]], changes, message: str):
    with pytest.raises(DataError, match=message):
        Mixture(sources, 0, **changes)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A dog runs .", "a dog runs"),
        ("  Two  dogs , one\tball !", "two dogs, one ball!"),
        ("A man 's hat .", "a man's hat"),
        ("U.S. flag...", "u.s. flag"),
        (".", "."),
    ],
)
def test_captions_are_cleaned(raw: str, clean: str):
    assert plain(raw) == clean


@given(st.text(min_size=1))
def test_cleaning_twice_changes_nothing_more(text: str):
    assert plain(plain(text)) == plain(text)


TOLD = Draw(0, 0, caption=0, captions=(0,), questions=(), view=0)


def batches(samples: list[Sample], texts: Texts, size: int, **changes) -> Batches:
    return Batches(Mixture([(samples, 1.0)], 0, questions=0.5), [rows_and_views], texts, size, **changes)


def captioned(count: int) -> list[Sample]:
    return [Sample(f"s{n}", ImageRef(Path(f"{n}.jpg")), (f"w{n} w{n + 1} w{n + 2}",)) for n in range(count)]


def test_stage_1_reads_captions_alone():
    batch = batches(captioned(6), Texts(qformer=QFORMER), 4)[0]
    rows = batch.images[:, 0, 0].long()
    first = WORDS.index("w0")
    expected = torch.stack(
        [torch.tensor([1, first + row, first + row + 1, first + row + 2, 2]) for row in rows.tolist()]
    )
    assert torch.equal(batch.ids, expected)
    assert batch.images.shape == (4, 3, 2)
    assert batch.images.dtype == torch.float32
    assert batch.prompts == ()
    assert batch.targets.numel() == 0


def test_q_former_texts_are_cut_with_their_frame_kept():
    sample = Sample("s", ImageRef(Path("s.jpg")), (" ".join(f"w{n}" for n in range(40)),))
    batch = batches([sample], Texts(qformer=QFORMER, max_length=8), 1)[0]
    assert batch.ids.shape == (1, 8)
    assert batch.ids[0, [0, -1]].tolist() == [1, 2]


def test_ranks_together_read_what_one_process_reads():
    samples = make_samples(20, questions=2)
    texts = Texts(qformer=QFORMER, language=LANGUAGE)
    whole = batches(samples, texts, 8)[3]
    parts = [batches(samples, texts, 8, rank=rank, world=2)[3] for rank in range(2)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.image_ids for part in parts]), whole.image_ids)
    assert parts[0].prompts + parts[1].prompts == whole.prompts
    assert torch.equal(torch.cat([parts[0].owners, parts[1].owners + 4]), whole.owners)


def test_a_share_of_each_rank_s_rows_is_written_about_and_all_are_read():
    samples = make_samples(20, questions=2)
    texts = Texts(qformer=QFORMER, language=LANGUAGE, questions=QFORMER)
    for rank in range(2):
        whole = batches(samples, texts, 12, rank=rank, world=2)[3]
        some = batches(samples, texts, 12, rank=rank, world=2, lm_share=0.4)[3]
        assert torch.equal(some.images, whole.images)
        assert torch.equal(some.ids, whole.ids)
        count = int((whole.owners < 3).sum())  # 0.4 of 6 rows, and one that is begun
        assert torch.equal(some.owners, whole.owners[:count])
        assert some.prompts == whole.prompts[:count]
        assert len(some.targets) == len(some.questions) == count
        assert torch.equal(some.targets, whole.targets[:count, : some.targets.shape[1]])


def test_a_resumed_loader_goes_on_as_if_never_stopped():
    data = batches(captioned(10), Texts(qformer=QFORMER), 3)
    whole = list(DataLoader(data, batch_size=None, sampler=range(8)))
    resumed = list(DataLoader(batches(captioned(10), Texts(qformer=QFORMER), 3), batch_size=None, sampler=range(5, 8)))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(whole[5:], resumed, strict=True))


def test_rows_of_one_picture_or_one_caption_share_their_image_id():
    one, two = ImageRef(Path("1.jpg")), ImageRef(Path("2.jpg"))
    samples = [
        Sample("a", one, ("w0",)),
        Sample("b", one, ("w1",)),
        Sample("c", two, ("W1 .",)),
        Sample("d", ImageRef(Path("3.jpg")), ("w2",)),
    ]
    batch = batches(samples, Texts(qformer=QFORMER), 4)[0]
    a, b, c, d = (int(batch.image_ids[batch.images[:, 0, 0] == row]) for row in range(4))
    assert a == b == c != d


def test_a_caption_target_ends_with_the_stop_token_and_padding_is_ignored():
    samples = [Sample("a", ImageRef(Path("a")), ("w1",)), Sample("b", ImageRef(Path("b")), ("w1 w2 w3",))]
    batch = batches(samples, Texts(language=LANGUAGE), 2)[0]
    w = WORDS.index("w0")
    by_row = dict(zip(batch.images[:, 0, 0].tolist(), batch.targets.tolist(), strict=True))
    assert by_row == {0.0: [w + 1, 3, -100, -100], 1.0: [w + 1, w + 2, w + 3, 3]}
    assert batch.prompts == ((), ())
    assert batch.ids.shape == (2, 0)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode([number for number in ids if number >= 0])


def test_a_question_is_the_prompt_and_its_answer_the_target_with_the_space_between():
    tokenizer = spaced()
    texts = Texts(language=tokenizer)
    sample = Sample("s", ImageRef(Path("s")), ("A dog .",), (("how many?", "two"),))
    told, asked = texts.pairs(sample, Draw(0, 0, 0, (0,), (0,), 0), ())
    prompts, targets = texts.tokenize([asked, told])
    assert decode(tokenizer, prompts[0]) == "Question: how many? Answer:"
    assert tokenizer.decode(targets[0, :4].tolist()) == " two"
    assert targets[0, 4] == 256
    assert prompts[1] == ()
    assert decode(tokenizer, targets[1, :5].tolist()) == "a dog"


def test_a_caption_prompt_stands_before_the_caption():
    tokenizer = spaced()
    texts = Texts(language=tokenizer, prompts=PromptConfig(caption="a photo of"))
    sample = Sample("s", ImageRef(Path("s")), ("A dog .",))
    prompts, targets = texts.tokenize(texts.pairs(sample, TOLD, ()))
    assert decode(tokenizer, prompts[0]) == "a photo of"
    assert decode(tokenizer, targets[0, :-1].tolist()) == " a dog"


def test_a_target_cut_at_its_limit_does_not_claim_to_end():
    texts = Texts(language=LANGUAGE, max_length=3)
    _, targets = texts.tokenize([("", "w1 w2 w3 w4"), ("", "w1 w2")])
    assert targets[0].tolist() == [WORDS.index(f"w{n}") for n in (1, 2, 3)]
    assert targets[1, -1] == 3


@given(count=st.integers(1, 12), key=st.integers(0, 1000))
def test_prefix_lm_cuts_between_the_first_word_and_the_middle(count: int, key: int):
    caption = " ".join(f"w{n}" for n in range(count))
    sample = Sample("s", ImageRef(Path("s")), (caption,))
    [(prompt, target)] = Texts(language=LANGUAGE, prefix_lm=True).pairs(sample, TOLD, (key,))
    assert f"{prompt} {target}".strip() == caption
    assert min(1, count - 1) <= len(prompt.split()) <= max(count // 2, 0)


def test_every_cut_of_prefix_lm_comes_up():
    sample = Sample("s", ImageRef(Path("s")), ("w0 w1 w2 w3 w4 w5",))
    texts = Texts(language=LANGUAGE, prefix_lm=True)
    cuts = {len(texts.pairs(sample, TOLD, (key,))[0][0].split()) for key in range(50)}
    assert cuts == {1, 2, 3}


def test_sources_of_other_image_shapes_do_not_mix():
    mixture = Mixture([(captioned(4), 1.0), (captioned(4), 1.0)], 0)
    wide = Batches(mixture, [rows_and_views, lambda rows, _: torch.zeros(len(rows), 5, 2)], Texts(qformer=QFORMER), 4)
    with pytest.raises(DataError, match="must have images of one shape"):
        wide[0]


def test_a_batch_that_ranks_cannot_share_and_stage_1_without_captions_are_refused():
    with pytest.raises(DataError, match="a batch of 5 cannot be shared by 2 ranks"):
        batches(captioned(6), Texts(qformer=QFORMER), 5, world=2)
    with pytest.raises(DataError, match="'s0' has no caption"):
        batches(make_samples(2, captions=0, questions=1), Texts(qformer=QFORMER), 2)
    with pytest.raises(DataError, match="'s0' has no caption; stage 1 and rewards"):
        batches(make_samples(2, captions=0, questions=1), Texts(language=LANGUAGE), 2, reward_share=1.0)
    with pytest.raises(DataError, match="texts need"):
        Texts()
