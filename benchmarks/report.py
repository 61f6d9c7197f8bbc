"""Write the README's benchmark tables from ``benchmarks/results/*.json``, and its roofline predictions.

``python benchmarks/report.py`` rewrites the text between the README's ``<!-- benchmarks -->`` marks and,
where it has any, its ``<!-- roofline -->`` marks; with ``--check`` it only says whether that text is what it
would write (exit status 1 if not).
"""

import json
import sys
from pathlib import Path

import roofline

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
LIMITS = {
    "gemm_gflops": "fp32 matrix product",
    "gemm_bfloat16_gflops": "bf16 matrix product",
    "gemm_float16_gflops": "fp16 matrix product",
    "copy_gbytes": "copy",
}


def machine_section(record: dict) -> str:
    """One machine's table: a line for each of our rows, beside the peer that it was measured against."""
    limits = {name: rate for name, rate in record["limits"].items() if rate}
    measured = ", ".join(f"{LIMITS[name]} {_rate(name, limits[name])}" for name in LIMITS if name in limits)
    cuda = record.get("cuda")
    runs_on = f"CUDA {cuda}" if cuda else f"{record['threads']} threads"
    rows = {(r["op"], r["case"], r["label"]): r for r in record["rows"]}
    ours = [r for key, r in rows.items() if r["label"].startswith("ours") and not _is_second(key, rows)]
    columns = {name: cell for name, cell in COLUMNS.items() if name in ALWAYS or any(map(cell, ours, ours))}
    peers = [rows[r["op"], r["case"], r["baseline"]] for r in ours]
    lines = [[cell(*pair) for cell in columns.values()] for pair in zip(ours, peers, strict=True)]
    return "\n".join(
        [
            f"**{record['machine']}**, {runs_on}, torch {record['torch']}, {record['date'][:10]}"
            + (f"; limits measured in the same run: {measured}." if measured else "."),
            f"Command: `{record['command']}`.",
            *_left_out(record.get("left_out", [])),
            "",
            "<details><summary>Every comparison</summary>",
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "</details>",
        ]
    )


def _is_second(key: tuple[str, str, str], rows: dict) -> bool:
    """Whether it is a row of Triton's that has a row of CUDA's beside it: the README shows the latter."""
    op, case, label = key
    return "triton" in label and (op, case, label.replace("triton", "cuda")) in rows


def _left_out(refusals: list[dict]) -> list[str]:
    counts: dict[str, int] = {}
    for refusal in refusals:
        counts[refusal["label"]] = counts.get(refusal["label"], 0) + 1
    said = ", ".join(f"{label} ({count})" for label, count in counts.items())
    return [f"Peers that refused comparisons, and how many: {said}."] if said else []


def _rate(name: str, rate: float) -> str:
    if name.endswith("gbytes"):
        return f"{rate:.1f} GB/s"
    return f"{rate:.0f} GFLOP/s" if rate < 1e4 else f"{rate / 1e3:.0f} TFLOP/s"


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:,.2f} ms" if microseconds >= 100 else f"{microseconds:.1f} µs"


def _case(row: dict, peer: dict) -> str:
    return row["case"] + row["label"].removeprefix("ours")


def _peer(row: dict, peer: dict) -> str:
    return f"{_time(peer['microseconds'])} ({peer['label']})"


def _floor(row: dict, peer: dict) -> str:
    return _time(row["floor_microseconds"]) if row.get("floor_microseconds") else ""


def _share(row: dict, peer: dict) -> str:
    return f"{row['limit_share']:.0%}" if row["limit_share"] else ""


def _peak(row: dict, peer: dict) -> str:
    if row.get("peak_mbytes") is None:
        return ""
    return f"{row['peak_mbytes']:,.1f} MB ({peer['peak_mbytes']:,.1f})"


COLUMNS = {  # of a row and its peer
    "operation": lambda row, peer: row["op"],
    "case": _case,
    "ours": lambda row, peer: _time(row["microseconds"]),
    "peer": _peer,
    "speed-up": lambda row, peer: f"{row['speedup']:.2f}×",
    "floor": _floor,
    "of limit": _share,
    "peak memory (peer's)": _peak,
}
ALWAYS = ("operation", "case", "ours", "peer", "speed-up", "of limit")  # the others where a row has them


def between(text: str, name: str, body: str, needed: bool) -> str:
    """``text`` with ``body`` between the marks of that name."""
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(marks[0])
    _, found, after = rest.partition(marks[1])
    if found:
        return f"{before}{marks[0]}\n{body}\n{marks[1]}{after}"
    if needed:
        raise SystemExit(f"README.md has no {marks[0]} ... {marks[1]}")
    return text


def readme_text() -> str:
    """The README with its generated parts rewritten."""
    records = [json.loads(p.read_text()) for p in sorted((HERE / "results").glob("*.json"))]
    measured = "\n\n".join(machine_section(r) for r in records)
    text = between(README.read_text(), "benchmarks", measured, needed=True)
    return between(text, "roofline", roofline.table(), needed=False)


def main() -> int:
    text = readme_text()
    if "--check" in sys.argv[1:]:
        fresh = text == README.read_text()
        print(
            "README.md is up to date"
            if fresh
            else "README.md's tables are stale; run python benchmarks/report.py"
        )
        return not fresh
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
