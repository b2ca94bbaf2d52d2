"""README's tables, from the recorded pieces."""

import json
from pathlib import Path

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
FAULTS = ("lost", "hung", "twice", "late", "wrong", "mixed", "another's")


def total(pieces: list[dict], kind: str) -> int:
    return sum(piece["outcomes"].get(kind, 0) for piece in pieces)


def line(name: str, pieces: list[dict]) -> str:
    others = {
        kind: total(pieces, kind)
        for kind in sorted({kind for piece in pieces for kind in piece["outcomes"]})
        if kind != "ok" and kind not in FAULTS
    }
    cells = [
        f"{sum(piece['count'] for piece in pieces)} {name}" + (f" in {len(pieces)} pieces" if len(pieces) > 1 else ""),
        f"{sum(piece['asked'] for piece in pieces):,}",
        f"{total(pieces, 'ok'):,}",
        ", ".join(f"{count} x {kind}" for kind, count in others.items()) or "none",
        str(sum(total(pieces, kind) for kind in FAULTS)),
        str(sum(piece["resent"] for piece in pieces)),
    ]
    return "| " + " | ".join(cells) + " |"


def figures(name: str, piece: dict) -> str:
    head = f"* {name}, {piece['count']} with seed {piece['seed']}, isolation {piece['isolation']}"
    head += f", cores {piece['cores']}"
    if "rate_per_s" in piece:
        head += f", {piece['rate_per_s']:.0f} requests/s of a capacity of {piece['capacity_per_s']:.0f}"
    told = []
    if "p99_ratio" in piece:
        low, value, high = piece["p99_ratio"]
        p99 = piece["p99_ms"]
        told.append(f"p99 {p99['swap']:.2f} ms during a swap, {p99['steady']:.2f} ms else: {value:.2f} times")
        told.append(f"(95 % interval {low:.2f} to {high:.2f})")
        if "p99_ratio_paired" in piece:
            low, value, high = piece["p99_ratio_paired"]
            told.append(f"median of the pairs {value:.2f} times ({low:.2f} to {high:.2f})")
        told.append(f"a swap lasts {piece['swap_s']['median']:.2f} s")
    if "refused_by_kill" in piece:
        by = piece["refused_by_kill"]
        told.append(f"a kill failed {by['mean']:.1f} requests on average, {by['most']} at most")
    if "stop_s" in piece:
        told.append(f"SIGTERM to exit {piece['stop_s']['median']:.2f} s, start {piece['start_s']['median']:.2f} s")
    if "slope_bytes_per_request" in piece:
        low, value, high = piece["slope_bytes_per_request"]
        rss = [mark["rss_bytes"] / 2**20 for mark in piece["marks"]]
        told.append(f"{piece['requests_per_s']:.0f} requests/s, {piece['swaps']} swaps")
        told.append(f"memory in MiB at every 5 %: {', '.join(f'{size:.1f}' for size in rss)}")
        told.append(f"slope of the second half {value:.2f} bytes a request (95 % interval {low:.2f} to {high:.2f})")
    return f"{head}: {'; '.join(told)}."


def write_page(here: Path) -> None:
    rows, lines = [], []
    for name in ("swaps", "restarts", "kills", "soak"):
        path = here / f"results-{name}.json"
        if path.exists():
            pieces = json.loads(path.read_text())
            rows.append(line(name, pieces))
            lines += [figures(name, piece) for piece in pieces]
    table = [
        "| run | requests | answered rightly | refused | lost, hung, doubled or wrong | sent again |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *lines,
        "",
    ]
    page = here / "README.md"
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(head + BEGIN + "\n" + "\n".join(table) + END + rest.partition(END)[2])
