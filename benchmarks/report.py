"""Write the README's benchmark tables from ``benchmarks/results/*.json``.

``python benchmarks/report.py`` rewrites the text between the README's ``<!-- benchmarks -->`` marks; with
``--check`` it only says whether that text is what it would write (exit status 1 if not).
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")


def machine_section(record: dict) -> str:
    """One machine's tables: a line for each of our rows, beside the peer that it was measured against."""
    limits = {k: v for k, v in record["limits"].items() if v}
    names = {"gemm_gflops": "fp32 matrix product {:.0f} GFLOP/s", "copy_gbytes": "copy {:.1f} GB/s"}
    measured = ", ".join(names[k].format(v) for k, v in limits.items())
    head = [
        f"**{record['machine']}**, {record['threads']} threads, torch {record['torch']}, "
        + record["date"][:10]
        + (f"; limits measured in the same run: {measured}." if measured else "."),
        f"Command: `{record['command']}`.",
        "",
        "<details><summary>Every comparison</summary>",
        "",
        "| operation | case | ours | peer | speed-up | of limit |",
        "|---|---|---|---|---|---|",
    ]
    rows = {(r["op"], r["case"], r["label"]): r for r in record["rows"]}
    ours = [r for r in record["rows"] if r["label"].startswith("ours")]
    lines = [_line(row, rows[row["op"], row["case"], row["baseline"]]) for row in ours]
    return "\n".join([*head, *lines, "", "</details>"])


def _line(row: dict, peer: dict) -> str:
    what = row["case"] + row["label"].removeprefix("ours")
    share = f"{row['limit_share']:.0%}" if row["limit_share"] else ""
    cells = [row["op"], what, _ms(row), f"{_ms(peer)} ({peer['label']})", f"{row['speedup']:.2f}×", share]
    return f"| {' | '.join(cells)} |"


def _ms(row: dict) -> str:
    return f"{row['microseconds'] / 1e3:,.2f} ms"


def readme_text() -> str:
    """The README with its benchmark part rewritten."""
    text = README.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"README.md has no {MARKS[0]} ... {MARKS[1]}")
    records = [json.loads(p.read_text()) for p in sorted((HERE / "results").glob("*.json"))]
    body = "\n\n".join(machine_section(r) for r in records)
    return f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}"


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
