"""What bench_cpu.py measured, as Markdown and JSON. Needs no torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

BNB = ("bitsandbytes", "bnb flat")  # alternatives of a row; the fastest counts


@dataclass
class Row:
    op: str
    shape: str
    threads: int
    tokens: int | None
    times: dict[str, float]  # seconds by alternative; "nested" and "flat" are ours
    floor: float | None = None
    target: str = ""
    faults: dict[str, int] = field(default_factory=dict)  # page faults of a call, where they matter


@dataclass
class Machine:
    read: float = 0.0  # bytes/s, one large tensor
    copy: float = 0.0  # bytes/s, read + written
    product: float = 0.0  # flop/s, torch's bf16
    peak: float = 0.0  # flop/s, bf16, the instruction alone
    panels: float = 0.0  # flop/s, bf16, in a product whose weights are written to the cache first; 0 if not known


def name(shape) -> str:
    return f"{shape[0]} x {shape[1]}"


HEAD = (
    "| op | out x in | threads | tokens | ours nested ms | ours flat ms | bitsandbytes ms | bf16 torch ms | floor ms | "
    "bnb/ours | bf16/ours | floor/ours | nested/flat | target |\n" + "|---" * 14 + "|"
)


def line(row: Row) -> str:
    t = row.times
    ours = t["nested"]

    def ms(key):
        return f"{t[key] * 1e3:.3f}" if key in t else ""

    def ratio(a, b):
        return f"{a / b:.2f}" if a and b else ""

    bnb = min((t[k] for k in BNB if k in t), default=None)
    cells = [row.op, row.shape, str(row.threads), str(row.tokens or ""), ms("nested"), ms("flat")]
    cells += [f"{bnb * 1e3:.3f}" if bnb else "", ms("bf16"), f"{row.floor * 1e3:.3f}" if row.floor else ""]
    if "flat kernel" in t:  # kernel against kernel
        cells[4:6] = (f"{t[key] * 1e3:.4f}, kernel {t[f'{key} kernel'] * 1e3:.4f}" for key in ("nested", "flat"))
        ours = t["flat kernel"]
    cells += [ratio(bnb, ours), ratio(t.get("bf16"), ours), ratio(row.floor, ours)]
    cells += [ratio(t["nested"], t.get("flat")), row.target]
    return "| " + " | ".join(cells) + " |"


def ceiling(m: Machine) -> str:
    names = "bf16 multiply-add", "the same in a product by panels", "torch's bf16 product"
    rates = zip(names, (m.peak, m.panels, m.product), strict=True)
    flops = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates if rate)
    return f"read {m.read / 1e9:.0f} GB/s, copy {m.copy / 1e9:.0f} GB/s, {flops}"


def markdown(ceilings: dict[int, Machine], info: dict, rows: list[Row], peaks: dict, steps: dict) -> str:
    about = ", ".join(f"{k} {v}" for k, v in info.items())
    measured = "; ".join(f"{threads} thread{'s' * (threads > 1)}: {ceiling(m)}" for threads, m in ceilings.items())
    text = [f"{about}.", "", f"Ceilings measured in the same run: {measured}.", "",
            "Medians of alternatives that took turns. Column bitsandbytes: the faster of nested and flat.",
            "", HEAD, *map(line, rows)]  # fmt: skip
    for row in rows:
        if row.faults:
            of = ", ".join(f"{key} {count}" for key, count in row.faults.items())
            where = f"{row.op}, {row.shape}, {row.threads} thread{'s' * (row.threads > 1)}"
            text += ["", f"Page faults of a call, {where}: {of}."]
    medians = {row.shape: row.times for row in rows if row.op == "training step"}
    for model, of_arm in peaks.items():
        shown = ", ".join(f"{arm} {nbytes / 2**20:.0f} MiB" for arm, nbytes in of_arm.items())
        text += ["", f"Training step, {model}: peak resident memory of the steps {shown}."]
        if rest := medians.get(model, {}).get("rest"):
            text += [f"Without its linear layers and adapters (`rest`) a step takes {rest * 1e3:.0f} ms."]
        for arm, runs in steps[model].items():
            medians_of = ", ".join(f"{s * 1e3:.0f} ms, {n:.0f} page faults" for s, n in runs)
            text += [f"{arm}, medians of each process: {medians_of}."]
    return "\n".join(text) + "\n"


def save(folder: Path | None, ceilings, info, rows, peaks, steps) -> None:
    """Written after every shape: a run that is cut off leaves what it measured."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_cpu.md").write_text(markdown(ceilings, info, rows, peaks, steps))
    content = {"machine": info, "ceilings": {t: asdict(m) for t, m in ceilings.items()}, "peaks": peaks, "steps": steps}
    (folder / "bench_cpu.json").write_text(json.dumps({**content, "rows": [asdict(r) for r in rows]}, indent=1))
