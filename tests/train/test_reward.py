"""Self-critical training: what a caption is worth, and that captions which are worth more become likelier."""

from pathlib import Path

import fine
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import finish, run_ranks, run_start
from processes import start as begin
from pycocoevalcap.cider.cider import Cider
from test_distributed import same

from blip2.train.distributed import World
from blip2.train.parts import assemble
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
    judge = SelfCritical(Consensus(references), tokenizer, model.config.prompts, 8, 4, 1.0, vocabulary, World())
    torch.manual_seed(0)
    visual = (0.3 * torch.randn(2, 4, writer.width)).requires_grad_(True)
    optimizer = torch.optim.Adam([visual], lr=0.05)
    worth = []
    for step in range(60):
        optimizer.zero_grad()
        loss = judge(writer, visual, references, step)
        loss.backward()
        optimizer.step()
        worth.append(-loss.item())
    assert sum(worth[-10:]) > 1.5 * sum(worth[:10]) > 0  # of at most 7.5: 1.7 for 0.8


def test_its_value_is_the_reward_and_its_gradient_that_of_the_chosen_texts(data: Path, opt: Path, tmp_path: Path):
    recipe = parse(fine.recipe(data, opt, tmp_path / "run", model=STILL, **REWARD))
    job = assemble(recipe, None, World(), torch.device("cpu"), torch.float32)
    objective, batch = job.objective.train(), job.batches(0)
    first, again, other = (objective(batch, seed)["reward"] for seed in (0, 0, 1))
    assert first == again != other
    assert first < 0
    judge = objective.reward
    visual = objective.bridge.project(
        objective.bridge.look(objective.bridge.see(objective.encoder(batch.images))).hidden
    )
    visual = visual.detach().requires_grad_(True)
    judge(objective.language, visual, batch.references, 0).backward()
    assert visual.grad.abs().sum() > 0
    objective.eval()
    assert set(objective(batch, 0)) == {"lm"}, "held-out captions are not drawn"


def test_texts_that_are_all_alike_teach_nothing(data: Path, opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = parse(fine.recipe(data, opt, tmp_path / "run", **REWARD))
    job = assemble(recipe, None, World(), torch.device("cpu"), torch.float32)
    monkeypatch.setattr(Consensus, "__call__", lambda _, written, __: [0.5 for _ in written])
    loss = job.objective.train()(job.batches(0), 0)["reward"]
    assert loss.item() == -0.5
    loss.backward()
    gradients = [p.grad for p in job.trained.parameters() if p.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


def test_two_ranks_draw_and_learn_what_one_does(data: Path, opt: Path, tmp_path: Path):
    values = {"steps": 4, "model": STILL, **REWARD}
    assert finish(begin(run_start, fine.recipe(data, opt, tmp_path / "one", **values))) == 0
    assert run_ranks(fine.recipe(data, opt, tmp_path / "two", **values), 2, run_start) == [0, 0]
    same(tmp_path / "one", tmp_path / "two")
