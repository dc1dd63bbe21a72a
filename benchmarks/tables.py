"""The tables and plots of `benchmarks.performance`, from its JSON alone.

    python -m benchmarks.tables docs/performance.json docs/performance.md

writes the tables between the page's marks anew, and the plot beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2 import drawing

PEERS = ("float32", "bfloat16")
SIDES = ("float32", "bfloat16", "int8", "int4")
WORKS = {  # row: what is done, the model, and how much faster than transformers' float32 it shall be
    "caption": ("one caption, 20 tokens, greedy", "opt2.7b", {"float32": 1.15, "bfloat16": 2.2, "int8": 3.0}),
    "beams": ("one caption, 20 tokens, 5 beams", "opt2.7b", {"float32": 2.5, "bfloat16": 5.0, "int8": 7.0}),
    "questions": ("ten questions on one image, 10 tokens each", "opt2.7b", {"float32": 5.0, "int8": 15.0}),
    "match": ("ITM of 8 images x 32 texts", "itm-vit-g", {"float32": 12.0, "int8": 25.0}),
    "t5": ("one answer, 10 tokens, 5 beams", "flan-t5-xl", {"int8": 3.0}),
    "mini": ("200 captions from a folder, 5 beams", "mini", {"float32": 4.0, "bfloat16": 4.0}),
}
MEMORY_ASKED = 5e9  # bytes at most, of one caption with int8
START_ASKED, LOAD_ASKED = 5.0, 1.0  # seconds
SCORES = 1e-4  # that probabilities of matching may be apart in float32: sums in another order
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One side of one row, as the table shows it.

    Attributes:
        seconds: the median, scaled to the whole where a part was timed; None where it failed.
        ratio, fastest: how many times as fast as transformers' float32, and as its fastest precision.
        limit: seconds that the machine's measured rates allow.
        same: what was compared and how it came out; `None` where there is nothing to compare with.
        wrong: float32 results differ from transformers'.
    """

    row: str
    side: str
    precision: str
    seconds: float | None
    ratio: float | None = None
    fastest: float | None = None
    asked: float | None = None
    limit: float | None = None
    same: str = ""
    note: str = ""
    wrong: bool = False


def seconds(found: dict[str, Any]) -> float:
    """Of a whole row, from the part that was timed."""
    return statistics.median(found["seconds"]) * found["whole"] / found["parts"]


def lines(results: dict[str, Any]) -> list[Line]:
    """Every row that was measured, side by side."""
    made: list[Line] = []
    for row, (_, model, asked) in WORKS.items():
        theirs = {name: _run(results, f"{model} theirs {name}", row) for name in PEERS}
        times = {name: seconds(found) for name, found in theirs.items() if "seconds" in found}
        exact = _run(results, f"{model} ours float32", row)
        for side, precisions in (("theirs", PEERS), ("ours", SIDES)):
            for precision in precisions:
                found = _run(results, f"{model} {side} {precision}", row)
                if not found:
                    continue
                if "error" in found:
                    made.append(Line(row, side, precision, None, note=found["error"]))
                    continue
                took = seconds(found)
                plain = side == "ours" and precision == "float32"
                same, wrong = _same(found, theirs.get("float32", {}) if plain else exact, exactly=plain)
                if (side, precision) == ("theirs", "float32"):
                    same = ""  # the row of ours says it
                kl = _run(results, f"{model} {side} {precision}", "logits").get("kl")
                made.append(
                    Line(
                        row, side, precision, took,
                        ratio=times["float32"] / took if "float32" in times else None,
                        fastest=min(times.values()) / took if times else None,
                        asked=asked.get(precision) if side == "ours" else None,
                        limit=found.get("limit"),
                        same=same + (f", KL {kl:.1e}" if kl and not plain else ""),
                        note=f"timed {found['parts']} of {found['whole']}" if found["parts"] < found["whole"] else "",
                        wrong=wrong,
                    )
                )  # fmt: skip
    return made


def _run(results: dict[str, Any], key: str, row: str) -> dict[str, Any]:
    """What a side found in a row; the error of its process where it did not come so far."""
    return results["runs"].get(key, {}).get(row, {})


def _same(found: dict[str, Any], expected: dict[str, Any], *, exactly: bool) -> tuple[str, bool]:
    """How two sides' results agree, and whether that is wrong; what only one of them has is not compared."""
    whom = "transformers" if exactly else "fp32"
    if not expected or "error" in expected or expected is found:
        return "", False
    if "scores" in found:
        apart = max(abs(a - b) for a, b in zip(_paired(found), _paired(expected), strict=False))
        return f"probabilities within {apart:.1e} of those of {whom}", exactly and apart > SCORES
    kind = "tokens" if "tokens" in found else "texts"
    pairs = list(zip(found[kind], expected[kind], strict=False))
    if kind == "texts":
        equal = sum(a == b for a, b in pairs)
        return f"{equal} of {len(pairs)} captions as {whom}", exactly and equal < len(pairs)
    places = [a == b for one, other in pairs for a, b in zip(one, other, strict=False)]
    if all(places):
        return f"all {len(places)} tokens as {whom}", False
    return f"{sum(places)} of {len(places)} tokens as {whom}", exactly


def _paired(found: dict[str, Any]) -> Sequence[float]:
    """Scores of image i with text i, which both sides have; a matrix has them on its diagonal."""
    scores = found["scores"]
    return [row[at] for at, row in enumerate(scores)] if isinstance(scores[0], list) else scores


# -- as text ---------------------------------------------------------------------------------------------------------


def speed(results: dict[str, Any]) -> str:
    """The table of the timed rows."""
    columns = ("work", "side", "seconds", "x transformers fp32", "x its fastest", "asked", "limit, s", "x the limit",
               "results")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for line in lines(results):
        what, model, _ = WORKS[line.row]
        side = f"{'blip2' if line.side == 'ours' else 'transformers'} {line.precision}"
        if line.seconds is None:
            rows.append((f"{what} ({model})", side, "failed", *[""] * 5, line.note))
            continue
        times = line.seconds / line.limit if line.limit else None
        remarks = "; ".join(each for each in (line.same.upper() if line.wrong else line.same, line.note) if each)
        rows.append(
            (f"{what} ({model})", side, f"{line.seconds:.2f}", _x(line.ratio), _x(line.fastest), _x(line.asked),
             f"{line.limit:.2f}" if line.limit else "", _x(times), remarks)
        )  # fmt: skip
    return table(columns, rows)


def memory(results: dict[str, Any]) -> str:
    """Peak memory of one caption."""
    rows: list[tuple[str, ...]] = []
    for key, found in results["runs"].items():
        if "resident" in (peak := found.get("memory", {})):
            model, side, precision = key.split()
            who = f"{'blip2' if side == 'ours' else 'transformers'} {precision}"
            asked = f"under {MEMORY_ASKED / 1e9:.0f}" if (side, precision) == ("ours", "int8") else ""
            sizes = (f"{peak[name] / 1e9:.2f}" for name in ("resident", "anonymous"))
            least = f"{peak['limit'] / 1e9:.2f}" if "limit" in peak else ""
            rows.append((model, who, *sizes, least, asked))
    return table(("model", "side", "resident, GB", "of it anonymous", "its weights alone", "asked"), rows)


def start(results: dict[str, Any]) -> str:
    """`blip2 caption photo.jpg`, from the start of the process."""
    found = results.get("start", {})
    asked = {"process": START_ASKED, "load": LOAD_ASKED}
    names = {"process": "`blip2 caption photo.jpg`, start to text", "load": "`blip2.load()` after `import torch`"}
    rows = [
        (names[key], f"{statistics.median(found[key]):.2f}", f"{len(found[key])}", f"under {limit:.0f}")
        for key, limit in asked.items()
        if key in found
    ]
    if "error" in found:
        rows.append(("failed", "", "", found["error"]))
    return table(("mini", "seconds, median", "runs", "asked"), rows)


def machine(results: dict[str, Any]) -> str:
    """What it was measured on, and the rates that the limits stand on."""
    own, rates = results["machine"], results["rates"]
    rows = [
        ("processor", f"{own['processor']}, {own['threads']} of {own['cores']} cores, {own['memory']} GB"),
        ("features", ", ".join(own["features"])),
        ("versions", ", ".join(f"{name} {value}" for name, value in own["versions"].items())),
        ("reads", f"{rates['bandwidth'] / 1e9:.1f} GB a second"),
        *((f"multiplies {name}", f"{rate / 1e9:.0f} Gop a second") for name, rate in rates["operations"].items()),
        ("command", f"`{results['command']}`"),
    ]
    return table(("machine", ""), rows)


def training(results: dict[str, Any]) -> str:
    """What the benchmark of training printed, as it stands."""
    return results.get("training", {}).get("table", "not measured\n")


TABLES = {"speed": speed, "memory": memory, "start": start, "machine": machine, "training": training}


def _x(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in cells)


def plot(results: dict[str, Any]) -> str:
    """The seconds of every row side by side."""
    groups: dict[str, dict[str, float]] = {}
    for line in lines(results):
        if line.seconds is not None:
            what, model, _ = WORKS[line.row]
            side = f"{'blip2' if line.side == 'ours' else 'transformers'} {line.precision}"
            groups.setdefault(f"{what} ({model})", {})[side] = line.seconds
    return drawing.bars(groups)


def filled(page: str, results: dict[str, Any], made: Mapping[str, Callable[[dict[str, Any]], str]] = TABLES) -> str:
    """A page with the tables between its marks written anew."""
    return MARKS.sub(lambda found: f"{found[1]}{made[found[2]](results)}{found[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("page", type=Path)
    chosen = parser.parse_args()
    results = json.loads(chosen.json.read_text(encoding="utf-8"))
    chosen.page.write_text(filled(chosen.page.read_text(encoding="utf-8"), results), encoding="utf-8")
    chosen.page.with_suffix(".svg").write_text(plot(results), encoding="utf-8")


if __name__ == "__main__":
    main()
