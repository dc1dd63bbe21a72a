"""The `blip2` command as a process: help, exit codes, streams, signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import blip2
from blip2.cli import app

COMMANDS = (
    *("caption", "ask", "chat", "match", "explain", "embed", "index", "search", "dedupe"),
    *("classify", "calibrate", "filter"),
    *("info", "convert", "verify", "train", "bench", "evaluate"),
)
EVALUATIONS = ("caption", "vqa", "gqa", "retrieval")
PICTURE = str(Path(__file__).parents[2] / "docs" / "cat.jpg")
START = "from blip2.cli import main; main()"


def command(*words: str, code: str = START, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def test_no_help_imports_torch():
    calls = [[], *([name] for name in COMMANDS), *(["evaluate", name] for name in EVALUATIONS)]
    code = f"""
import sys
from typer.testing import CliRunner
from blip2.cli import app
for words in {calls}:
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0, words
print([name for name in ("torch", "transformers", "numpy", "PIL") if name in sys.modules])
"""
    assert command(code=code).stdout == "[]\n"


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), *(["evaluate", name] for name in EVALUATIONS)])
def test_every_help_teaches_by_example(words: list[str]):
    text = CliRunner().invoke(app, [*words, "--help"]).stdout
    example = " ".join(["blip2", *words])
    assert any(line.strip().startswith(example) for line in text.splitlines())


def test_the_commands_are_these_and_no_others():
    groups = [group.name for group in app.registered_groups]
    names = [item.name or getattr(item.callback, "__name__", "") for item in app.registered_commands]
    assert sorted([*names, *groups]) == sorted(COMMANDS)


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert command("--version").stdout == f"blip2 {version('blip2')}\n"
    assert blip2.__version__ == version("blip2")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "blip2", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"blip2 {blip2.__version__}\n"


def test_a_wrong_call_exits_with_2_and_says_so_on_stderr():
    for words in (
        ["nothing"],
        ["caption"],
        ["caption", "a.jpg", "--beams", "3"],
        ["search", "d", "x", "--top", "0"],
    ):
        result = command(*words)
        assert (result.returncode, result.stdout) == (2, "")
        assert "--help" in result.stderr or "-h" in result.stderr


def test_an_error_of_ours_is_one_line_and_exits_with_1(tmp_path: Path):
    result = command("info", str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {tmp_path}")
    assert len(result.stderr.splitlines()) == 1


def test_debug_shows_where_an_error_came_from(tmp_path: Path):
    result = command("info", str(tmp_path), BLIP2_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_fault_of_ours_is_one_line_that_asks_for_a_report():
    code = f"import blip2\ndef load(*_, **__): return 1 / 0\nblip2.load = load\n{START}"
    result = command("match", PICTURE, "-t", "a dog", code=code)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ZeroDivisionError")
    assert "BLIP2_DEBUG=1" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_exits_with_130_and_no_traceback():
    ctrl_c = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` turns it off
    load = """
import blip2, time
def load(*_, **__):
    print("ready", flush=True)
    time.sleep(60)
blip2.load = load
"""
    process = subprocess.Popen(
        [sys.executable, "-c", ctrl_c + load + START, "match", PICTURE, "-t", "a dog"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_results_stay_in_the_pipe_while_a_bar_is_on_the_terminal():
    code = "from blip2.cli.console import progress, result\nwith progress('images', 2): result('kept')"
    terminal, end = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen, os.fdopen(end, "wb") as stderr:
        result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, check=True)
        assert result.stdout == b"kept\n"
        assert b"images" in screen.read(4096)


def test_a_reader_that_leaves_early_makes_no_noise():
    process = subprocess.Popen(
        [sys.executable, "-c", START, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.wait(timeout=60)


def test_the_reference_of_the_command_line_is_that_of_the_app(tmp_path: Path):
    made = tmp_path / "cli.md"
    words = ["blip2.cli", "utils", "docs", "--name", "blip2", "--title", "The command line", "--output", str(made)]
    subprocess.run([sys.executable, "-m", "typer", *words], check=True, capture_output=True, timeout=120)
    kept = Path(__file__).parents[2] / "docs" / "cli.md"
    assert kept.read_text() == made.read_text(), "run `make docs-cli`"
