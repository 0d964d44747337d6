"""Put a benchmark's Markdown table into README.md, between its markers: `python tools/readme_table.py FOLDER`.

FOLDER is a results folder of tools/check_gpu.py or tools/bench.py (it holds bench_cuda.md or bench_cpu.json). The
section between <!-- bench:cuda --> and <!-- /bench:cuda --> (or :cpu) is replaced; nothing else is touched. Of the rows
for a CPU the README shows those on all threads and the training steps, as ratios.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from bench_cpu_report import BNB

ROOT = Path(__file__).resolve().parent.parent


def replaced(readme: str, device: str, table: str) -> str:
    """`readme` with the section of `device` replaced by `table`; ValueError if the markers are not there once."""
    section = re.compile(rf"(<!-- bench:{device} -->\n).*?(<!-- /bench:{device} -->)", re.S)
    if len(section.findall(readme)) != 1:
        raise ValueError(f"README.md must hold <!-- bench:{device} --> and <!-- /bench:{device} --> once")
    return section.sub(lambda m: f"{m[1]}{table.strip()}\n{m[2]}", readme)


def cpu_summary(text: str) -> str:
    """The rows of bench_cpu.json with the most threads and the training steps, shortened."""
    content = json.loads(text)
    rows, about = content["rows"], content["machine"]
    threads = max(row["threads"] for row in rows)
    lines = [
        f"{about['CPU']}, {threads} threads, {about['variant']}; torch {about['torch']}, bitsandbytes "
        f"{about['bitsandbytes']}; {about['date']}, commit {about['commit']}. Ours with double quantization. "
        "Every op has a process of its own, where bitsandbytes' allocations cost page faults ([docs/08]"
        "(docs/08_kernels.md#measured)). Products kept: under checkpointing ([docs/10](docs/10_finetuning.md)).",
        "",
        "| op | out x in | tokens | ours ms | bitsandbytes / ours | bf16 torch / ours | floor / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["threads"] < threads and not row["op"].startswith("training step"):
            continue
        times = row["times"]
        ours = times.get("nested kernel", times["nested"])  # kernel against kernel
        bnb = min((times[k] for k in BNB if k in times), default=None)
        ratios = (f"{t / ours:.2f}" if t else "" for t in (bnb, times.get("bf16"), row["floor"]))
        cells = row["op"], row["shape"], str(row["tokens"] or ""), f"{1e3 * ours:.3g}", *ratios
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    tables = {"cuda": args.folder / "bench_cuda.md", "cpu": args.folder / "bench_cpu.json"}
    found = {device: path for device, path in tables.items() if path.exists()}
    if not found:
        print(
            f"{args.folder} holds neither bench_cuda.md nor bench_cpu.json; run tools/bench.py --output",
            file=sys.stderr,
        )
        return 2
    readme = args.readme.read_text()
    for device, path in found.items():
        table = path.read_text()
        readme = replaced(readme, device, cpu_summary(table) if device == "cpu" else table)
    temporary = args.readme.with_suffix(".tmp")
    temporary.write_text(readme)
    os.replace(temporary, args.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
