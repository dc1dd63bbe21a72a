"""The command that compares a whole model with transformers at full size, run at a tiny one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_command_compares_everything_and_finds_both_alike(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.exactness", str(tmp_path), "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    whats = {line["what"] for line in report["compared"]}
    assert {"patches", "queries", "visual prefix", "first logits after ''", "greedy after ''"} <= whats
    assert {"first logits after 'w5 w9 w1 w30'", "5 beams after 'w5 w9 w1 w30'"} <= whats
    assert all(line["equal"] for line in report["compared"])
    assert all(line["difference"] < 1e-4 for line in report["compared"] if line["difference"] is not None)
    assert {side: cost["seconds"] > 0 for side, cost in report["cost"].items()} == {"ours": True, "theirs": True}
