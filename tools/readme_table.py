"""Put a benchmark's Markdown table into README.md, between its markers: `python tools/readme_table.py FOLDER`.

FOLDER is a results folder of tools/check_gpu.py or tools/bench.py (it holds bench_cuda.md or bench_cpu.md). The section
between <!-- bench:cuda --> and <!-- /bench:cuda --> (or :cpu) is replaced; nothing else is touched.
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def replaced(readme: str, device: str, table: str) -> str:
    """`readme` with the section of `device` replaced by `table`; ValueError if the markers are not there once."""
    section = re.compile(rf"(<!-- bench:{device} -->\n).*?(<!-- /bench:{device} -->)", re.S)
    if len(section.findall(readme)) != 1:
        raise ValueError(f"README.md must hold <!-- bench:{device} --> and <!-- /bench:{device} --> once")
    return section.sub(lambda m: f"{m[1]}{table.strip()}\n{m[2]}", readme)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    tables = {device: args.folder / f"bench_{device}.md" for device in ("cuda", "cpu")}
    found = {device: path for device, path in tables.items() if path.exists()}
    if not found:
        print(
            f"{args.folder} holds neither bench_cuda.md nor bench_cpu.md; run tools/bench.py --output", file=sys.stderr
        )
        return 2
    readme = args.readme.read_text()
    for device, path in found.items():
        readme = replaced(readme, device, path.read_text())
    temporary = args.readme.with_suffix(".tmp")
    temporary.write_text(readme)
    os.replace(temporary, args.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
