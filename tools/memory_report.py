#!/usr/bin/env python3
"""Will it fit? `qlora-ref estimate` as a script that runs from a checkout, nothing installed but tabulate.

python tools/memory_report.py --model llama-65b --seq 512 --batch 1 --rank 64
python tools/memory_report.py --model llama-65b --compare trace
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from qlora_ref.cli import main

if __name__ == "__main__":
    sys.exit(main(["estimate", *sys.argv[1:]]))
