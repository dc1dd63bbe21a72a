"""Data sets in every layout that people keep, made up in a temporary folder."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.data import sources
from blip2.data.sources import ImageRef, Prototype
from blip2.errors import DataError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shard(path: Path, keys: list[str]) -> Path:
    members: dict[str, bytes] = {}
    for key in keys:
        members[f"{key}.jpg"] = f"picture {key}".encode() * 50
        members[f"{key}.json"] = json.dumps({"captions": [f"a {key}", f"one {key}"]}).encode()
    return write_tar(path, members)


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"picture {name}".encode())


def image_bytes(sample: sources.Sample) -> bytes:
    assert isinstance(sample.image, ImageRef)
    return sample.image.read()


def test_shard_members_are_grouped_by_key_and_read_where_they_lie(tmp_path: Path):
    shard(tmp_path / "a.tar", ["cat", "dog"])
    cat, dog = sources.read(tmp_path / "a.tar")
    assert (cat.id, cat.captions) == ("cat", ("a cat", "one cat"))
    assert image_bytes(dog) == b"picture dog" * 50
    assert image_bytes(cat) == b"picture cat" * 50


@given(st.lists(st.binary(max_size=2000), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_indexed_bytes_equal_what_went_into_the_shard(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]):
    path = tmp_path_factory.mktemp("shards") / "a.tar"
    members: dict[str, bytes] = {}
    for number, content in enumerate(contents):
        members |= {f"{number}.png": content, f"{number}.txt": b"a thing"}
    write_tar(path, members)
    assert [image_bytes(sample) for sample in sources.read(path)] == contents


@pytest.mark.parametrize("pattern", ["train-{00..01}.tar", "train-{00,01}.tar", "train-*.tar", ""])
def test_shards_are_named_by_folder_braces_or_glob(tmp_path: Path, pattern: str):
    shard(tmp_path / "train-00.tar", ["a"])
    shard(tmp_path / "train-01.tar", ["b"])
    assert [sample.id for sample in sources.read(str(tmp_path / pattern))] == ["a", "b"]


def test_caption_and_questions_are_read_from_json_and_caption_from_txt(tmp_path: Path):
    row = {"caption": " a cat ", "questions": [["what is it?", "cat"]]}
    write_tar(
        tmp_path / "a.tar", {"a.webp": b"1", "a.json": json.dumps(row).encode(), "b.png": b"2", "b.txt": b"a dog\n"}
    )
    a, b = sources.read(tmp_path / "a.tar")
    assert (a.captions, a.questions, b.captions) == (("a cat",), (("what is it?", "cat"),), ("a dog",))


@pytest.mark.parametrize("kept", [0.4, 0.7, 0.95])
def test_a_shard_cut_short_names_itself_and_its_last_whole_sample(tmp_path: Path, kept: float):
    keys = [f"k{n}" for n in range(20)]
    whole = shard(tmp_path / "whole.tar", keys).read_bytes()
    content = whole[: int(len(whole.rstrip(b"\0")) * kept)]
    (tmp_path / "cut.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"cut\.tar: the shard is cut short .* 'k\d+'\. Copy it again") as caught:
        sources.read(tmp_path / "cut.tar")
    last = str(caught.value).split("'")[1]
    assert f"picture {last}".encode() * 50 in content
    beyond = keys[keys.index(last) + 2 :]
    assert not any(f'"one {key}"'.encode() in content for key in beyond)


def test_a_shard_cut_between_two_members_is_cut_short_too(tmp_path: Path):
    whole = shard(tmp_path / "whole.tar", ["a", "b"]).read_bytes()
    boundary = next(n for n in range(0, len(whole), 512) if whole[n : n + 5] == b"b.jpg")
    (tmp_path / "cut.tar").write_bytes(whole[:boundary])
    with pytest.raises(DataError, match="cut short"):
        sources.read(tmp_path / "cut.tar")


def test_what_is_no_tar_says_so(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(DataError, match=r"a\.tar: not a readable tar"):
        sources.read(tmp_path / "a.tar")


def test_a_missing_shard_is_named(tmp_path: Path):
    shard(tmp_path / "t-0.tar", ["a"])
    with pytest.raises(DataError, match=r"t-1\.tar: no such shard"):
        sources.read(str(tmp_path / "t-{0..1}.tar"))


def test_a_picture_without_text_in_a_shard_is_named(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"x.jpg": b"1"})
    with pytest.raises(DataError, match=r"a\.tar: x: no x\.txt and no x\.json"):
        sources.read(tmp_path / "a.tar")


def test_a_text_without_picture_in_a_shard_is_named(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"x.txt": b"a cat"})
    with pytest.raises(DataError, match=r"a\.tar: x: one picture"):
        sources.read(tmp_path / "a.tar")


def test_an_id_in_two_shards_is_an_error(tmp_path: Path):
    shard(tmp_path / "a.tar", ["x"])
    shard(tmp_path / "b.tar", ["x"])
    with pytest.raises(DataError, match=r"b\.tar: x\.json: id 'x' comes twice"):
        sources.read(tmp_path)


def flickr8k(root: Path) -> Path:
    pictures(root / "Flicker8k_Dataset", "1_a.jpg", "2_b.jpg", "3_c.jpg")
    text = root / "Flickr8k_text"
    text.mkdir()
    tokens = [f"{name}#{n}\t{name[2]} number {n} ." for name in ("1_a.jpg", "2_b.jpg", "3_c.jpg") for n in range(2)]
    (text / "Flickr8k.token.txt").write_text("\n".join([*tokens, "3_c.jpg.1#0\tnobody's picture ."]) + "\n")
    for split, name in (("train", "1_a.jpg"), ("dev", "2_b.jpg"), ("test", "3_c.jpg")):
        (text / f"Flickr_8k.{split}Images.txt").write_text(name + "\n")
    return root


@pytest.mark.parametrize(("split", "key"), [("train", "1_a"), ("val", "2_b"), ("dev", "2_b"), ("test", "3_c")])
def test_flickr8k_is_read_in_its_official_layout(tmp_path: Path, split: str, key: str):
    (sample,) = sources.read(flickr8k(tmp_path), split=split)
    assert sample.id == key
    assert sample.captions[:2] == (f"{key[2]} number 0 .", f"{key[2]} number 1 .")
    assert image_bytes(sample) == f"picture {key}.jpg".encode()


def test_flickr8k_needs_a_split_and_its_pictures(tmp_path: Path):
    root = flickr8k(tmp_path)
    with pytest.raises(DataError, match="needs a split: train, val or test"):
        sources.read(root)
    (root / "Flicker8k_Dataset" / "1_a.jpg").unlink()
    with pytest.raises(DataError, match=r"Flickr_8k\.trainImages\.txt:1: the picture .*1_a\.jpg is not there"):
        sources.read(root, split="train")


def coco(root: Path) -> Path:
    pictures(root / "val2017", "000000000007.jpg", "000000000009.jpg")
    (root / "annotations").mkdir()
    images = [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 9, "file_name": "000000000009.jpg"}]
    captions = [{"image_id": 9, "caption": "nine"}, {"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}]
    content = json.dumps({"images": images, "annotations": captions})
    (root / "annotations" / "captions_val2017.json").write_text(content)
    return root


def test_coco_is_read_in_its_own_layout(tmp_path: Path):
    seven, nine = sources.read(coco(tmp_path), split="val2017")
    assert (seven.id, seven.captions, nine.captions) == ("7", ("a", "b"), ("nine",))
    assert image_bytes(nine) == b"picture 000000000009.jpg"


def test_coco_tells_which_splits_there_are(tmp_path: Path):
    with pytest.raises(DataError, match="one of val2017, not 'train'"):
        sources.read(coco(tmp_path), split="train")


@pytest.mark.parametrize("image", ["image", "file", "path", "filename", "file_name"])
@pytest.mark.parametrize("caption", ["caption", "text", "captions"])
def test_tables_are_read_whatever_their_columns_are_called(tmp_path: Path, image: str, caption: str):
    pictures(tmp_path, "sub/a.jpg")
    (tmp_path / "t.csv").write_text(f'{image},{caption}\nsub/a.jpg,"a cat, asleep"\n')
    (tmp_path / "t.tsv").write_text(f"{image}\t{caption}\nsub/a.jpg\ta cat, asleep\n")
    (tmp_path / "t.jsonl").write_text(json.dumps({image: "sub/a.jpg", caption: "a cat, asleep"}) + "\n\n")
    read = [sources.read(tmp_path / name) for name in ("t.csv", "t.tsv", "t.jsonl")]
    assert read[0] == read[1] == read[2]
    assert read[0][0].captions == ("a cat, asleep",)


def test_rows_of_one_picture_become_one_sample(tmp_path: Path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\nb.jpg,other\na.jpg,two\n")
    assert [sample.captions for sample in sources.read(tmp_path / "t.csv")] == [("one", "two"), ("other",)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg,", r"t\.csv:3: an empty caption for 'a\.jpg'"),
        ("gone.jpg,text", r"t\.csv:3: the picture .*gone\.jpg is not there"),
        (",text", r"t\.csv:3: no picture named"),
        ("a.jpg", r"t\.csv:3: 2 columns are expected"),
        ("a.jpg,text,more", r"t\.csv:3: 2 columns are expected"),
    ],
)
def test_a_bad_line_of_a_table_is_named(tmp_path: Path, line: str, message: str):
    pictures(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text(f"image,caption\na.jpg,fine\n{line}\n")
    with pytest.raises(DataError, match=message):
        sources.read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"t\.jsonl:1: not readable as JSON"),
        ("[1]", r"t\.jsonl:1: a JSON object is expected"),
        ('{"image": "a.jpg"}', "neither captions nor questions"),
        ('{"image": "a.jpg", "captions": ["x", " "]}', "an empty caption"),
        ('{"image": "a.jpg", "captions": 3}', "captions must be a text or a list of texts"),
        ('{"image": "a.jpg", "questions": [["only a question"]]}', "a question is a pair"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, row: str, message: str):
    pictures(tmp_path, "a.jpg")
    (tmp_path / "t.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=message):
        sources.read(tmp_path / "t.jsonl")


def test_one_id_for_two_pictures_is_an_error(tmp_path: Path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    rows = [{"id": "x", "image": name, "caption": "c"} for name in ("a.jpg", "b.jpg")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"t\.jsonl:2: id 'x' comes twice, with another picture at .*t\.jsonl:1"):
        sources.read(tmp_path / "t.jsonl")


def test_a_folder_of_pictures_takes_the_text_beside_each(tmp_path: Path):
    pictures(tmp_path, "sub/a.jpg", "b.PNG")
    (tmp_path / "sub" / "a.txt").write_text("first\nsecond\n")
    (tmp_path / "b.txt").write_text("third")
    b, a = sources.read(tmp_path)
    assert (a.id, a.captions, b.id, b.captions) == ("sub/a", ("first", "second"), "b", ("third",))


def test_a_picture_without_text_and_an_empty_text_are_named(tmp_path: Path):
    pictures(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg: no a\.txt beside it"):
        sources.read(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match=r"a\.txt: an empty caption"):
        sources.read(tmp_path)


def test_pictures_of_a_folder_that_are_only_asked_about_need_no_captions(tmp_path: Path):
    pictures(tmp_path, "asked.jpg", "told.jpg", "neither.jpg")
    (tmp_path / "told.txt").write_text("a dog")
    asked = tmp_path / "questions.jsonl"
    asked.write_text(json.dumps({"id": "asked", "questions": [["what is it?", "a dog"]]}) + "\n")
    one, other = sources.read(tmp_path, "folder", questions=asked)
    assert (one.id, one.captions, one.questions) == ("asked", (), (("what is it?", "a dog"),))
    assert (other.id, other.captions, other.questions) == ("told", ("a dog",), ())


def test_class_names_become_captions_of_prototypes(tmp_path: Path):
    (tmp_path / "c.jsonl").write_text('{"class": 3, "names": ["owl", "hawk"]}\n')
    (sample,) = sources.read(tmp_path / "c.jsonl", "classes", templates=["a photo of {}"])
    assert sample.image == Prototype(3)
    assert sample.captions == ("a photo of an owl", "a photo of a hawk")


@pytest.mark.parametrize("template", ["{name}", "{} and {}", "a {", "{0.shape}"])
def test_a_template_that_does_not_fit_is_named(tmp_path: Path, template: str):
    (tmp_path / "c.jsonl").write_text('{"class": 3, "names": ["owl"]}\n')
    with pytest.raises(DataError) as error:
        sources.read(tmp_path / "c.jsonl", "classes", templates=["{}", template])
    assert f"c.jsonl: the template {template!r} does not fit" in str(error.value)


def test_questions_that_are_no_list_are_named_by_file_and_line(tmp_path: Path):
    pictures(tmp_path, "a.jpg")
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "caption": "a cat", "questions": 5}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:1: questions must be a list of pairs .*, not 5"):
        sources.read(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "caption": "a cat"}\n')
    (tmp_path / "q.jsonl").write_text('{"id": "a.jpg", "questions": 5}\n')
    with pytest.raises(DataError, match=r"q\.jsonl:1: questions must be a list of pairs"):
        sources.read(tmp_path / "t.jsonl", questions=tmp_path / "q.jsonl")


def test_what_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "shards" / "a.tar").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a\.tar: cannot be read: Is a directory"):
        sources.read(tmp_path / "shards")
    (tmp_path / "coco" / "annotations" / "captions_val.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"captions_val\.json: cannot be read as JSON: Is a directory"):
        sources.read(tmp_path / "coco", split="val")


def test_questions_beside_a_data_set_join_it_by_id(tmp_path: Path):
    shard(tmp_path / "a.tar", ["cat", "dog"])
    (tmp_path / "q.jsonl").write_text('{"id": "dog", "questions": [["what?", "a dog"]]}\n')
    cat, dog = sources.read(tmp_path / "a.tar", questions=tmp_path / "q.jsonl")
    assert (cat.questions, dog.questions) == ((), (("what?", "a dog"),))
    (tmp_path / "q.jsonl").write_text('{"id": "cow", "questions": []}\n')
    with pytest.raises(DataError, match=r"q\.jsonl:1: questions for 'cow', which is not among the samples"):
        sources.read(tmp_path / "a.tar", questions=tmp_path / "q.jsonl")


def test_an_empty_place_an_unknown_format_and_a_needless_split_are_errors(tmp_path: Path):
    with pytest.raises(DataError, match="no samples found"):
        sources.read(tmp_path)
    with pytest.raises(DataError, match="neither a folder nor"):
        sources.read(tmp_path / "nothing")
    with pytest.raises(DataError, match="unknown format 'tfrecord'"):
        sources.read(tmp_path, "tfrecord")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no splits"):
        sources.read(tmp_path, "folder", split="train")


def test_a_picture_that_became_shorter_since_it_was_indexed_is_named(tmp_path: Path):
    path = shard(tmp_path / "a.tar", ["cat"])
    (sample,) = sources.read(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"a\.tar@512: 550 bytes expected, 88 found"):
        image_bytes(sample)
