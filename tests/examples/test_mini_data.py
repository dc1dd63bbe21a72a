"""The data of `mini`, prepared from small made-up originals."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mini"))

import prepare
import questions
import stamps
from composites import compose, usable
from questions import Question
from wordnet import WordNet

from blip2.data import sources


def test_singulars_are_found_whatever_the_plural(wordnet: WordNet):
    words = {"dogs": "dog", "geese": "goose", "puppies": "puppy", "cherries": "cherry", "scissors": "scissors"}
    assert {word: wordnet.lemma(word) for word in words} == words
    assert wordnet.lemma("xyzzy") is None


@pytest.mark.parametrize(
    ("title", "noun"),
    [
        ("A frog.", "frog"),
        ("A pair of red cherries in a bowl!", "cherry"),
        ("A green and white apple (ripe).", "apple"),
        ("Two geese, at the lake.", "goose"),
        ("A quokka.", "quokka"),
        ("", None),
    ],
)
def test_a_title_names_its_head_noun(wordnet: WordNet, title: str, noun: str | None):
    assert wordnet.head_noun(title) == noun


def test_synonyms_and_kinds_come_from_the_database(wordnet: WordNet):
    assert wordnet.synonyms("dog") == {"dog", "domestic dog"}
    (puppy,), (animal,) = wordnet.senses("puppy"), wordnet.senses("animal")
    assert wordnet.is_kind_of(puppy, animal)
    assert not wordnet.is_kind_of(animal, puppy)


def test_a_missing_database_says_what_to_install(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="apt install wordnet-base"):
        WordNet(tmp_path)


TITLES = {
    "animals/frog_1": "A frog.",
    "animals/frog_2": "A green frog!",
    "animals/goose": "A goose.",
    "animals/lion": "A lion.",
    "animals/bunny": "A bunny.",
    "animals/rabbit": "A rabbit.",
    "food/apple": "A red apple.",
    "food/cherry": "A pair of cherries.",
    "household/key": "A key.",
    "household/hammer": "A hammer.",
    "household/toilet_01": "Remember to flush the toilet!",
    "plants/rose": "A rose.",
    "symbols/a": "The letter a.",
}


@pytest.fixture
def stamp_folder(tmp_path: Path) -> Path:
    root = tmp_path / "stamps"
    for number, (name, title) in enumerate(TITLES.items()):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (40, 30))
        picture.paste((20 * number, 100, 200, 255), (10, 5, 30, 20))
        picture.save(path)
        path.with_suffix(".txt").write_text(title + "\nfr.utf8=Une chose.\n")
    Image.new("RGBA", (4, 4)).save(root / "animals" / "untitled.png")
    return root


def test_stamps_are_read_with_what_they_name(stamp_folder: Path, wordnet: WordNet):
    found = {stamp.id: stamp for stamp in stamps.read_stamps(stamp_folder, wordnet)}
    assert set(found) == {name for name in TITLES if not name.startswith("symbols")}
    assert found["food/cherry"].noun == "cherry"
    assert found["household/toilet_01"].title == "a toilet"
    assert found["animals/bunny"].concept == found["animals/rabbit"].concept


def test_no_name_stands_on_both_sides_of_the_split(stamp_folder: Path, wordnet: WordNet):
    found = stamps.read_stamps(stamp_folder, wordnet)
    held: set[str] = set()
    for seed in range(20):
        split = stamps.split_stamps(found, {0: ["goose"]}, {"lion": 1}, wordnet, seed)
        stamps.check_split(split, {}, [stamp.title for stamp in split.train], wordnet)
        assert len({stamp.concept for stamp in split.unseen}) == round(0.28 * 10)
        every = [*split.train, *split.unseen, *split.named, *split.dropped]
        assert sorted(stamp.id for stamp in every) == sorted(stamp.id for stamp in found)
        held |= {stamp.concept for stamp in split.unseen}
    assert "lion" not in held  # the other captions name it
    assert len(held) > 5


def test_the_split_is_a_function_of_the_seed(stamp_folder: Path, wordnet: WordNet):
    found = stamps.read_stamps(stamp_folder, wordnet)
    first, again, other = (stamps.split_stamps(found, {}, {}, wordnet, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_picture_is_named_only_where_something_else_teaches_its_name(
    stamp_folder: Path, wordnet: WordNet, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stamps, "NAMED", 1.0)
    monkeypatch.setattr(stamps, "HELD_OUT", 0.0)
    found = stamps.read_stamps(stamp_folder, wordnet)
    split = stamps.split_stamps(found, {0: ["a grey goose"]}, {"hammer": 9, "key": 1}, wordnet, 0)
    named = {stamp.id for stamp in split.named}
    assert {"animals/goose", "household/hammer"} < named
    assert len(named & {"animals/frog_1", "animals/frog_2"}) == 1
    assert "household/key" not in named
    assert "plants/rose" not in named


def test_classes_that_are_held_out_or_a_kind_of_it_are_not_trained(stamp_folder: Path, wordnet: WordNet):
    found = stamps.read_stamps(stamp_folder, wordnet)
    frogs = tuple(stamp for stamp in found if stamp.noun == "frog")
    split = stamps.Split(train=(), unseen=frogs, named=(), dropped=(), names=frozenset(["frog", "flower"]))
    dogs = stamps.Split((), (stamps.Stamp("d", Path("d"), "A dog.", "dog", "dog"),), (), (), frozenset(["dog"]))
    names = {0: ["tree frog"], 1: ["toad"], 2: ["puppy"], 3: ["hammer"]}
    synsets = dict(enumerate(wordnet.senses(noun)[0] for noun in ("rose", "frog", "puppy", "hammer")))
    assert set(stamps.trained_classes(names, synsets, split, wordnet)) == {2, 3}
    assert set(stamps.trained_classes(names, synsets, dogs, wordnet)) == {0, 1, 3}


def test_a_leak_is_caught(stamp_folder: Path, wordnet: WordNet):
    found = stamps.read_stamps(stamp_folder, wordnet)
    split = stamps.split_stamps(found, {}, {}, wordnet, 0)
    name = split.unseen[0].noun
    with pytest.raises(AssertionError, match="held-out name"):
        stamps.check_split(split, {}, [f"two {questions.plural(name)} and a hat"], wordnet)
    with pytest.raises(AssertionError, match="held-out name"):
        stamps.check_split(split, {0: [name]}, [], wordnet)
    both = stamps.Split(split.unseen, split.unseen, (), (), split.names)
    with pytest.raises(AssertionError, match="trained and held out"):
        stamps.check_split(both, {}, [], wordnet)


def test_composites_say_what_they_show(stamp_folder: Path, wordnet: WordNet, tmp_path: Path):
    parts = usable(stamps.read_stamps(stamp_folder, wordnet))
    assert "cherry" not in parts  # `a pair of cherries` is no name for one thing
    rows = [compose(number, parts, tmp_path, seed=0) for number in range(40)]
    assert rows[7] == compose(7, parts, tmp_path, seed=0)
    for row in rows:
        answers = dict(row["questions"])
        assert answers["what color is the background?"] in stamps.GROUNDS
        assert Image.open(tmp_path.parent / tmp_path.name / Path(row["image"]).name).size == (stamps.SIDE, stamps.SIDE)
        if " to the left of " in row["captions"][1]:
            left, right = row["captions"][1].split(" to the left of ")
            assert answers[f"what is to the left of the {right.split(' ', 1)[1]}?"] == left
        else:
            count = next(answer for question, answer in answers.items() if question.startswith("how many"))
            assert row["captions"][0].split()[0] == (count if count != "one" else row["captions"][0].split()[0])
            assert count != "one" or row["captions"][0].startswith(("a ", "an "))


def ask(*captions: str, kind: str | None = None) -> dict[str, str]:
    """The questions that the rules make of one picture, before they are balanced."""
    picture = questions.Picture("p", captions)
    rules = {"what": "_what", "color": "_colour", "how many": "_how_many", "where": "_where"}
    made = [q for name, rule in rules.items() if kind in (None, name) for q in getattr(questions, rule)(picture)]
    return {question.question: question.answer for question in made}


DOG = ("A black dog runs in the snow .", "A dog is running in the snow .", "The black dog runs .", "Dog in deep snow .")


def test_a_picture_on_which_captions_agree_is_asked_about():
    assert ask(*DOG) == {
        "what animal is this?": "a dog",
        "what is the dog doing?": "running",
        "what color is the dog?": "black",
        "how many dogs are there?": "one",
        "where is the dog?": "in the snow",
    }


@pytest.mark.parametrize(
    ("captions", "question", "answer"),
    [
        (("A man rides a bicycle .", "A man is riding a red bike ."), "what is the man riding?", "a bike"),
        (("A boy plays soccer .", "A boy playing soccer ."), "what is the boy playing?", "soccer"),
        (("A girl jumps .", "The girl is jumping ."), "what is the girl doing?", "jumping"),
        (("A man wearing a hat .", "A man wears a big hat ."), "what is the man wearing?", "a hat"),
    ],
)
def test_what_is_asked_of_objects_and_actions(captions: tuple[str, ...], question: str, answer: str):
    assert ask(*captions)[question] == answer


@pytest.mark.parametrize(
    ("captions", "answer"),
    [
        (("A white and black dog .", "A dog ."), "black and white"),
        (("A grey dog .", "A dog ."), "gray"),
        (("A black dog .", "A brown dog ."), None),
        (("A black dog and a brown dog .", "Two dogs ."), None),
        (("A white dog with black spots .", "A spotted dog ."), None),
        (("A black and white dog .", "A black dog ."), None),
    ],
)
def test_a_colour_is_asked_only_where_no_caption_disagrees(captions: tuple[str, ...], answer: str | None):
    assert ask(*captions, kind="color").get("what color is the dog?") == answer


@pytest.mark.parametrize(
    ("captions", "answer"),
    [
        (("Two dogs play .", "Two brown dogs .", "Dogs on grass ."), "two"),
        (("Two dogs play .", "Three dogs .", "Two dogs ."), None),
        (("Two dogs play .", "A dog chases another ."), None),
        (("A dog .", "A dog runs .", "The dog .", "Dog ."), "one"),
        (("A dog .", "A dog runs .", "The dog .", "A dog and another ."), None),
    ],
)
def test_a_number_is_asked_only_where_captions_agree(captions: tuple[str, ...], answer: str | None):
    assert ask(*captions, kind="how many").get("how many dogs are there?") == answer


@pytest.mark.parametrize(
    ("captions", "answer"),
    [
        (("A man sits on a bench .", "A man on a park bench ."), "on a bench"),
        (("A man throws a ball into the water .", "A man at the water ."), None),
        (("A man on the beach .", "A man in the snow .", "A man on the beach ."), None),
        (("A man on the beach .", "A woman on the beach ."), None),
    ],
)
def test_a_place_is_asked_only_of_one_subject_in_one_place(captions: tuple[str, ...], answer: str | None):
    found = ask(*captions, kind="where")
    assert (next(iter(found.values())) if found else None) == answer


def many() -> dict[str, list[str]]:
    """Pictures of which some have dogs, some boys, in all colours and places."""
    made: dict[str, list[str]] = {}
    for number in range(60):
        who = ("dog", "boy", "woman")[number % 3]
        does = (("runs", "running"), ("sits", "sitting"), ("swims", "swimming"))[number // 3 % 3]
        colour = ("black", "white", "red")[number // 9 % 3]
        made[f"p{number}"] = [
            f"A {who} {does[0]} with a {colour} ball .",
            f"A {who} is {does[1]} .",
            f"The {who} {does[0]} .",
            f"One {who} with a {colour} ball .",
        ]
    return made


def test_yes_and_no_come_equally_often_for_every_question():
    made = [question for question in questions.questions(many(), seed=0) if question.kind == "yes/no"]
    counts = Counter((question.question, question.answer) for question in made)
    asked = {question.question for question in made}
    assert all(counts[text, "yes"] == counts[text, "no"] > 0 for text in asked)
    assert {"is there a dog in the picture?", "is the boy running?", "is the ball red?"} <= asked
    assert len({(question.picture, question.question) for question in made}) == len(made)


def test_yes_and_no_are_true_of_their_pictures():
    captions = many()
    for made in questions.questions(captions, seed=0):
        if made.kind == "yes/no":
            words = set(" ".join(captions[made.picture]).lower().split())
            asked = next(
                word for word in reversed(made.question.strip("?").split()) if word not in ("picture", "the", "in")
            )
            assert (asked in words) == (made.answer == "yes")


def test_a_no_is_never_asked_of_what_a_caption_may_mean_by_another_word():
    captions = {f"p{n}": ["A poodle runs .", "A poodle .", "The animal runs ."] for n in range(5)}
    captions |= {f"d{n}": ["A dog .", "The dog .", "One dog ."] for n in range(5)}
    assert not [made for made in questions.questions(captions, 0) if "a dog" in made.question and made.answer == "no"]


def test_a_noun_before_another_is_not_taken_for_the_thing():
    assert not questions.Picture("p", ["A water bottle ."] * 5).has("water")
    assert questions.Picture("p", ["A dog in water .", "The water ."] * 2).has("water")


def test_no_answer_drowns_the_others():
    captions = {f"d{n}": ["A dog .", "The dog .", "One dog ."] for n in range(50)}
    captions |= {f"h{n}": ["A horse .", "The horse .", "One horse ."] for n in range(4)}
    made = [made for made in questions.questions(captions, 0) if made.question == "what animal is this?"]
    assert Counter(question.answer for question in made) == {"a dog": 8, "a horse": 4}


def test_questions_depend_on_captions_and_seed_alone():
    first, again = (questions.questions(many(), seed=1) for _ in range(2))
    assert first == again
    assert isinstance(first[0], Question)
    shuffled = dict(reversed(many().items()))
    key = lambda made: (made.picture, made.question, made.answer)  # noqa: E731
    assert sorted(questions.questions(shuffled, seed=1), key=key) == sorted(first, key=key)


def flickr8k(root: Path) -> Path:
    """The official distribution's layout: 6 pictures, 2 a split, two captions each."""
    folder, text = root / "Flicker8k_Dataset", root / "Flickr8k_text"
    folder.mkdir(parents=True)
    text.mkdir()
    names = [f"{number}_abc.jpg" for number in range(6)]
    for number, name in enumerate(names):
        Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(folder / name)
    tokens = [f"{name}#{n}\tA dog number {n} runs in the snow ." for name in names for n in range(3)]
    (text / "Flickr8k.token.txt").write_text("\n".join(tokens) + "\n")
    for place, split in enumerate(("train", "dev", "test")):
        (text / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names[2 * place : 2 * place + 2]) + "\n")
    return root


def test_the_official_flickr8k_becomes_shards_and_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    original = flickr8k(tmp_path / "original")
    prepare.main(["flickr8k", "--source", str(original), "--out", str(tmp_path / "shards")])
    assert capsys.readouterr().out.splitlines() == ["train: 2 pictures", "val: 2 pictures", "test: 2 pictures"]
    (first, _) = sources.read(f"{tmp_path}/shards/val-*.tar")
    assert first.id == "2_abc"
    assert len(first.captions) == 3
    assert isinstance(first.image, sources.ImageRef)
    assert first.image.read() == (original / "Flicker8k_Dataset" / "2_abc.jpg").read_bytes()
    prepare.main(["questions", "--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "out")])
    assert sources.read(f"{tmp_path}/shards/train-*.tar", questions=tmp_path / "out" / "questions-train.jsonl")


def test_a_picture_in_two_splits_is_caught(tmp_path: Path):
    original = flickr8k(tmp_path / "original")
    picture = original / "Flicker8k_Dataset"
    (picture / "4_abc.jpg").write_bytes((picture / "0_abc.jpg").read_bytes())
    with pytest.raises(AssertionError, match="4_abc is in train and in test"):
        prepare.main(["flickr8k", "--source", str(original), "--out", str(tmp_path / "shards")])


def test_questions_carry_their_kinds(tmp_path: Path):
    samples = [
        sources.Sample(key, sources.ImageRef(tmp_path / key), tuple(captions)) for key, captions in many().items()
    ]
    rows, kinds = prepare.question_rows(samples, seed=0)
    assert kinds.total() == sum(len(row["questions"]) for row in rows)
    assert all(len(row["questions"]) == len(row["kinds"]) for row in rows)
    assert set(kinds) <= set(questions.KINDS)


def test_stamps_are_prepared_so_that_sources_reads_them(
    tmp_path: Path, stamp_folder: Path, wordnet: WordNet, monkeypatch: pytest.MonkeyPatch
):
    synsets = {0: wordnet.senses("hammer")[0], 1: wordnet.senses("rose")[0]}
    monkeypatch.setattr(prepare, "imagenet_classes", lambda: ({0: ["hammer"], 1: ["rose"]}, synsets))
    prepare.main(["flickr8k", "--source", str(flickr8k(tmp_path / "original")), "--out", str(tmp_path / "shards")])
    out = tmp_path / "out"
    where = ["--shards", str(tmp_path / "shards"), "--source", str(stamp_folder), "--wordnet", str(wordnet.root)]
    prepare.main(["stamps", *where, "--out", str(out), "--composites", "5"])
    read = {name: sources.read(out / f"{name}.jsonl") for name in ("train", "composites", "unseen")}
    assert len(read["composites"]) == 5
    assert all(sample.questions for sample in read["composites"])
    assert not {sample.id for sample in read["train"]} & {sample.id for sample in read["unseen"]}
    held = set((out / "held-out-names.txt").read_text().split())
    for sample in (*read["train"], *read["composites"]):
        assert not held & set(wordnet.nouns(" ".join(sample.captions)))
    classes = [json.loads(line)["names"][0] for line in (out / "classes.jsonl").read_text().splitlines()]
    assert set(classes) == {"hammer", "rose"} - held


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]):
    for command in ([], ["flickr8k"], ["questions"], ["stamps"]):
        with pytest.raises(SystemExit) as stopped:
            prepare.main([*command, "--help"])
        assert stopped.value.code == 0
        assert "--out" in capsys.readouterr().out or not command


def test_what_is_missing_is_told_without_a_traceback(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"error: .*Flickr8k"):
        prepare.main(["flickr8k", "--source", str(tmp_path), "--out", str(tmp_path / "out")])
