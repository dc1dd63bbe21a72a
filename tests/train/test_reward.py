"""Self-critical training: what a caption is worth, and that captions which are worth more become likelier."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fine
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import finish, run_ranks, run_start
from processes import start as begin
from pycocoevalcap.cider.cider import Cider
from test_distributed import metrics, same

from blip2.data.sources import ImageRef, Sample
from blip2.model import prefix
from blip2.train.data import Batches, Mixture, Texts
from blip2.train.distributed import World
from blip2.train.objectives import Stage2
from blip2.train.parts import Job, assemble
from blip2.train.recipe import parse
from blip2.train.reward import Consensus, SelfCritical

REWARD = {"reward": {"weight": 1.0, "samples": 4}}
STILL = {"qformer": {"dropout": 0.0}}
texts = st.lists(st.integers(0, 6), min_size=1, max_size=9)


@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=2, max_size=5))
def test_it_is_cider_d_as_the_coco_evaluation_computes_it(pictures: list[tuple[list[int], list[list[int]]]]):
    truth = {n: [spelt(ids) for ids in references] for n, (_, references) in enumerate(pictures)}
    _, expected = Cider().compute_score(truth, {n: [spelt(written)] for n, (written, _) in enumerate(pictures)})
    consensus = Consensus([references for _, references in pictures])
    found = [consensus([written], references)[0] for written, references in pictures]
    assert found == pytest.approx(list(expected), abs=1e-9)


def spelt(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def test_what_only_some_pictures_show_is_worth_more_and_a_text_that_breaks_off_less():
    consensus = Consensus([[[1, 2, 9]], [[1, 3, 9]], [[4, 5, 9]]])
    common, rare, both, broken = consensus([[1], [2], [1, 2, 9], [1, 2]], [[1, 2, 9]])
    assert common < rare < broken < both == pytest.approx(7.5)  # there are no runs of four tokens
    assert consensus([[]], [[1, 2, 9]]) == [0.0]


def test_what_is_worth_more_becomes_likelier(start: Path):
    """Nothing but the reward teaches what to write of two pictures, whose queries are the weights here."""
    model = fine.load(start)
    writer, tokenizer = model.writer()
    stop, *words = tokenizer.stop_ids[0], *tokenizer.encode(["w1 w2 w3 w4"])[0]
    references = [[[words[0], words[1], stop]], [[words[2], words[3], stop]]]
    vocabulary = torch.tensor(sorted([stop, *words]))
    judge = SelfCritical(Consensus(references), tokenizer, model.config.prompts, 8, 4, 1.0, World())
    torch.manual_seed(0)
    visual = (0.3 * torch.randn(2, 4, writer.width)).requires_grad_(True)
    optimizer = torch.optim.Adam([visual], lr=0.05)
    worth = []
    for step in range(60):
        optimizer.zero_grad()
        loss = judge(writer, visual, references, step, vocabulary)
        loss.backward()
        optimizer.step()
        worth.append(-loss.item())
    assert sum(worth[-10:]) > 1.5 * sum(worth[:10]) > 0  # of at most 7.5: 1.7 for 0.8


@pytest.fixture
def job(data: Path, opt: Path, tmp_path: Path) -> Job:
    """Training by reward, as a recipe asks for it, of a quarter of the rows."""
    reward = {"reward": {"weight": 2.0, "samples": 5, "share": 0.25}, "vocabulary": "used"}
    recipe = parse(fine.recipe(data, opt, tmp_path / "run", model=STILL, **reward))
    return assemble(recipe, None, World(), torch.device("cpu"), torch.float32)


def test_its_value_is_the_reward_and_its_gradient_the_policy_s(job: Job, monkeypatch: pytest.MonkeyPatch):
    objective, batch = job.objective.train(), job.batches(0)
    assert isinstance(objective, Stage2)
    assert len(batch.references) == 2 < len(batch.images)
    judge, writer, vocabulary = objective.reward, objective.language, objective.vocabulary
    assert judge is not None
    assert vocabulary is not None
    judged: list[list[list[int]]] = []
    worth = iter([[0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0, 7.0]])
    monkeypatch.setattr(Consensus, "__call__", lambda _, written, __: judged.append(written) or next(worth))

    visual = torch.randn(2, 4, writer.width, requires_grad=True)
    loss = judge(writer, visual, batch.references, 0, vocabulary)
    (found,) = torch.autograd.grad(loss, visual)
    assert loss.item() == pytest.approx(-2 * (2.0 + 5.4) / 2)
    assert {token for texts in judged for ids in texts for token in ids} <= set(vocabulary.tolist())

    expected = torch.zeros(())
    shares = [[-2.0, -1.0, 0.0, 1.0, 2.0], [-0.4, -0.4, -0.4, -0.4, 1.6]]  # over the mean of all five
    for row, texts in enumerate(judged):
        spread = torch.tensor(shares[row]).std() + 0.1
        for share, ids in zip(shares[row], texts, strict=True):
            embeds, lengths = prefix.build(writer, visual[row : row + 1], [()], judge.tokenizer.bos, "before_bos")
            log_probs = writer.log_probs(embeds, lengths, torch.tensor([ids]), vocabulary)
            expected = expected - 2 * 5 / 4 * share / spread * log_probs.sum()  # 5 / 4: without the text itself
    tokens = sum(len(ids) for texts in judged for ids in texts)
    (gradient,) = torch.autograd.grad(expected / tokens, visual)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_the_same_seed_draws_the_same_and_held_out_captions_are_not_drawn(job: Job):
    objective, batch = job.objective.train(), job.batches(0)
    first, again, other = (objective(batch, seed)["reward"] for seed in (0, 0, 1))
    assert first == again != other
    assert set(objective.eval()(batch, 0)) == {"lm"}


def test_rows_without_references_are_not_judged(job: Job, monkeypatch: pytest.MonkeyPatch):
    objective, batch = job.objective.train(), job.batches(0)
    one, other = batch.references
    nothing = objective(dataclasses.replace(batch, references=((), ())), 0)["reward"]
    nothing.backward()
    assert nothing.item() == 0

    seen: list[tuple[torch.Tensor, Sequence[object]]] = []

    def judge(_: SelfCritical, __: object, visual: torch.Tensor, known: Sequence[object], *___: object) -> torch.Tensor:
        seen.append((visual, known))
        return visual.sum()

    monkeypatch.setattr(SelfCritical, "__call__", judge)
    for references in ((one, other, one), (one, (), other)):
        objective(dataclasses.replace(batch, references=references), 0)
    (everyone, _), (some, known) = seen
    assert known == [one, other]
    torch.testing.assert_close(some, everyone[[0, 2]])


def test_pictures_of_fewer_captions_have_no_references(data: Path):
    samples = [Sample("one", ImageRef(data), ("a circle",)), Sample("two", ImageRef(data), ("a circle", "a square"))]
    mixture, texts = Mixture([(samples, 1.0)], 0), Texts(language=tiny.tokenizer())
    drawn = Batches(mixture, [lambda rows, _: torch.zeros(len(rows), 3, 4)], texts, 8, reward_share=1.0)[0]
    chosen = Batches(
        mixture, [lambda rows, _: torch.zeros(len(rows), 3, 4)], texts, 8, reward_share=1.0, reward_captions=2
    )[0]
    assert {len(each) for each in drawn.references} == {1, 2}
    assert [len(each) for each in chosen.references] == [2 * (len(each) == 2) for each in drawn.references]


def test_texts_that_are_all_alike_teach_nothing(job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Consensus, "__call__", lambda _, written, __: [0.7 for _ in written])
    loss = job.objective.train()(job.batches(0), 0)["reward"]
    assert loss.item() == pytest.approx(-1.4)
    loss.backward()
    gradients = [p.grad for p in job.trained.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients)


@pytest.mark.parametrize(
    "changes", [{}, {"lora": {"rank": 2}, "precision": "bf16"}], ids=["float32", "an adapter, 16 bits"]
)
def test_an_encoder_decoder_and_a_decoder_train_by_it(changes: dict[str, Any], data: Path, start: Path, tmp_path: Path):
    settings = {"prefix_lm": None, "steps": 3, "log_every": 1, **REWARD, **changes}
    report = fine.run(data, start, tmp_path / "run", **settings)
    assert all(line["reward"] <= 0 for line in metrics(tmp_path / "run"))
    assert fine.said(fine.load(report.model)) != fine.said(fine.load(start))


def test_references_are_whole_where_targets_are_cut(data: Path):
    texts = Texts(language=tiny.tokenizer(), max_length=2)
    sample = Sample("a", ImageRef(data), ("a red circle", "a square"))
    words = [tiny.WORDS.index(word) for word in ("a", "red", "circle", "square", "[SEP]")]
    a, red, circle, square, stop = words
    assert texts.references(sample) == ((a, red, circle, stop), (a, square, stop))
    assert texts.tokenize([("", "a red circle")])[1].tolist() == [[a, red]]


def test_two_ranks_draw_and_learn_what_one_does(data: Path, opt: Path, tmp_path: Path):
    values = {"steps": 4, "model": STILL, **REWARD}
    assert finish(begin(run_start, fine.recipe(data, opt, tmp_path / "one", **values))) == 0
    assert run_ranks(fine.recipe(data, opt, tmp_path / "two", **values), 2, run_start) == [0, 0]
    same(tmp_path / "one", tmp_path / "two")
