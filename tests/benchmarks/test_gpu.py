"""The one call that measures a GPU, run on the CPU at a tiny size: every row is there and none fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_is_measured_and_both_sides_write_the_same_tokens(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not {name: row["error"] for name, row in found.items() if "error" in row}
    assert found["check"]["equal"]
    for name in ("caption", "beams", "questions", "answer"):  # float32 on both sides
        assert found[name]["tokens_equal"] == 1
        assert found[name]["times"] == found[name]["theirs"] / found[name]["ours"]
    assert found["batches"]["ours"] == max(row["ours"] for row in found["batches"]["sizes"].values())
    assert found["folder"]["images"] == 8
    assert set(found["memory"]["models"]["pretrain_opt2.7b"]) == {"bfloat16", "int8", "fp8", "int4"}
    schemes = found["coarse"]["schemes"]
    assert list(schemes) == ["plain", "int8", "fp8", "int4"]
    assert schemes["plain"]["tokens_equal"] == 1
    sizes = {name: row["step"]["gigabytes"] for name, row in schemes.items()}
    assert sizes["plain"] == found["step"]["gigabytes"]
    assert sizes["plain"] > 2 * sizes["int8"]  # float32 here, beside positions and norms that stay
    assert sizes["int8"] == sizes["fp8"] >= sizes["int4"]


def test_a_row_without_time_is_named_and_one_without_the_peer_has_no_ratio(tmp_path: Path):
    (tmp_path / "transformers.py").write_text("raise ImportError('not here')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from benchmarks import gpu; gpu.main()"
    command = [sys.executable, "-c", code, "--tiny", "--rows", "caption,beams", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers is not installed" in done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["caption"]["theirs"] is None
    done = subprocess.run(
        [*command, "--budget", "0"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert json.loads((tmp_path / "gpu.json").read_text())["beams"] == {"error": "no time left in the budget"}
