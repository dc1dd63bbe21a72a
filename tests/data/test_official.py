"""The files in which COCO, NoCaps and Karpathy's splits are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip2.data import sources
from blip2.errors import DataError


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.name.encode())


def entry(name: str, split: str, *captions: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [{"raw": caption} for caption in captions], **more}


def test_karpathys_split_of_coco_goes_by_cocos_ids_and_trains_on_its_rest(tmp_path: Path) -> None:
    for name in ("val2014/a.jpg", "val2014/b.jpg", "train2014/c.jpg"):
        picture(tmp_path / "coco" / name)
    images = [
        entry("a.jpg", "test", "a dog", "one dog", filepath="val2014", cocoid=391895),
        entry("b.jpg", "restval", "a cat", filepath="val2014", cocoid=2),
        entry("c.jpg", "train", "a cow", filepath="train2014", cocoid=3),
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    (test,) = sources.read(path, split="test", images=tmp_path / "coco")
    assert (test.id, test.captions) == ("391895", ("a dog", "one dog"))
    assert isinstance(test.image, sources.ImageRef)
    assert test.image.read() == b"a.jpg"
    train = sources.read(path, split="train", images=tmp_path / "coco")
    assert [sample.id for sample in train] == ["2", "3"]


def test_karpathys_splits_of_flickr_go_by_the_names_of_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "1000092795.jpg")
    path = write(tmp_path / "dataset.json", {"images": [entry("1000092795.jpg", "val", "Two men .")]})
    (sample,) = sources.read(path, split="val")
    assert (sample.id, sample.captions) == ("1000092795", ("Two men .",))
    with pytest.raises(DataError, match="needs a split, one of val, not 'test'"):
        sources.read(path, split="test")


def test_nocaps_pictures_know_their_domain_and_its_test_set_has_no_captions(tmp_path: Path) -> None:
    picture(tmp_path / "0001.jpg")
    image = {"id": 0, "file_name": "0001.jpg", "domain": "near-domain"}
    captions = [{"image_id": 0, "caption": f"a {name}"} for name in ("dog", "puppy")]
    path = write(tmp_path / "nocaps.json", {"images": [image], "annotations": captions})
    (sample,) = sources.read(path)
    assert (sample.id, sample.domain, sample.captions) == ("0", "near-domain", ("a dog", "a puppy"))
    path = write(tmp_path / "nocaps.json", {"images": [image]})
    assert sources.read(path, unlabelled=True)[0].captions == ()
    with pytest.raises(DataError, match="'0' has neither captions nor questions"):
        sources.read(path)


def test_cocos_own_file_is_read_by_its_name_and_needs_no_split(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "val2017" / "000000000009.jpg")
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [{"image_id": 9, "caption": "a dog"}],
    }
    path = write(tmp_path / "captions_val2017.json", content)
    (sample,) = sources.read(path, images=tmp_path / "pictures")
    assert sample.id == "9"
    with pytest.raises(DataError, match="has no splits"):
        sources.read(path, images=tmp_path / "pictures", split="val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "no samples found|neither COCO's layout"),
        ([1, 2], "neither COCO's layout"),
        ({"images": [{"id": 1}]}, "KeyError: 'file_name'"),
        ({"images": [{"sentences": []}]}, "KeyError: 'split'"),
        ({"images": [{"id": 1, "file_name": "/etc/passwd"}]}, "no name of a picture within"),
        ({"images": [{"id": 1, "file_name": "../x.jpg"}]}, "no name of a picture within"),
        ({"images": [{"id": 1, "file_name": "x.jpg"}]}, "the picture .* is not there"),
    ],
)
def test_what_is_no_such_file_is_an_error_that_names_it(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "data.json", content)
    with pytest.raises(DataError, match=message) as caught:
        sources.read(path)
    assert str(path) in str(caught.value)


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("deep.json", "none.json"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as JSON"):
            sources.read(tmp_path / name)


def test_a_folder_of_pictures_is_for_json_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is for \.json files"):
        sources.read(tmp_path, "folder", images=tmp_path)
