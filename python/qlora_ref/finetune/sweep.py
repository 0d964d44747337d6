"""Many runs from one grid file, into one SQLite table: resumable, one process a GPU or several on a CPU.

base:      keys of `qlora-ref train` shared by all runs (model, data, steps, ...)
arms:      name: {keys}                 what is compared (data types, ranks, datasets)
grid:      key: [values]                crossed with the arms (seed: [0, 1, 2])
permute:   true                         each seed arranges the base's channels anew before quantizing (permute.py)
compare:   {baseline: NAME, margin: M}  paired by everything but the arm; the margin is in nats
"""

import hashlib
import itertools
import json
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..cli import UserError
from . import run
from .config import FIELDS, TrainConfig, check, from_dict, load_yaml, suggestion

TABLE = """CREATE TABLE IF NOT EXISTS runs (
  id TEXT PRIMARY KEY, arm TEXT NOT NULL, replicate TEXT NOT NULL, status TEXT NOT NULL, error TEXT,
  loss_before REAL, loss_after REAL, seconds REAL, tokens INTEGER, peak_bytes INTEGER, weight_bytes INTEGER,
  config TEXT NOT NULL, finished TEXT)"""


@dataclass(frozen=True)
class Planned:
    """One run. `replicate`: what it shares with its partner in every other arm, as JSON."""

    id: str
    arm: str
    replicate: str
    config: TrainConfig


@dataclass(frozen=True)
class Study:
    runs: list[Planned]
    baseline: str | None
    margin: float
    permute: bool


def load_study(path: Path, output: Path) -> Study:
    """Read and check a grid file. UserError for unknown keys, values that cannot work, or an unknown baseline."""
    values = load_yaml(path)
    known = ("base", "arms", "grid", "permute", "compare")
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown section '{key}'.{suggestion(key, known)} Known: {', '.join(known)}.")
    for key in ("base", "arms", "grid", "compare"):
        if not isinstance(values.get(key) or {}, dict):
            raise UserError(f"{path}: {key} must be a mapping.")
    base = from_dict(values.get("base") or {}, f"{path}: base")
    arms = {name: from_dict(a or {}, f"{path}: arm {name}") for name, a in (values.get("arms") or {"run": {}}).items()}
    grid = {key: v if isinstance(v, list) else [v] for key, v in (values.get("grid") or {}).items()}
    for key in grid:
        if key not in FIELDS:
            raise UserError(f"{path}: grid has the unknown key '{key}'.{suggestion(key, FIELDS)}")
    runs = []
    for combination in itertools.product(*grid.values()):
        point = from_dict(dict(zip(grid, combination, strict=True)), f"{path}: grid")
        for name, arm in arms.items():
            # not by the memory of the moment: runs are compared, and several may start at once
            config = run.embedded(TrainConfig(**{**base, **arm, **point}))
            config = config.replace(keep_products=bool(config.keep_products))
            check(config)
            runs.append(_planned(name, point, config, output))
    compare = values.get("compare") or {}
    baseline = compare.get("baseline")
    if baseline is not None and baseline not in arms:
        raise UserError(f"{path}: the baseline '{baseline}' is not an arm.{suggestion(str(baseline), arms)}")
    return Study(runs, baseline, float(compare.get("margin", 0.01)), bool(values.get("permute")))


def _planned(arm: str, point: dict[str, Any], config: TrainConfig, output: Path) -> Planned:
    content = json.dumps(run.as_dict(config.replace(output="")), sort_keys=True)
    name = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = output / "runs" / f"{arm}-{name}"
    return Planned(name, arm, json.dumps(point, sort_keys=True), config.replace(output=str(folder)))


def connect(output: Path) -> sqlite3.Connection:
    output.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(output / "sweep.sqlite", timeout=60)
    database.execute(TABLE)
    return database


def finished(database: sqlite3.Connection) -> set[str]:
    return {row[0] for row in database.execute("SELECT id FROM runs WHERE status = 'done'")}


def permuted_base(model: str, seed: int, folder: Path) -> str:
    """A folder with `model`, its channels permuted by `seed`; made once, atomically."""
    from .loading import load_base, load_tokenizer, quiet
    from .permute import permute_llama

    if not (folder / "config.json").exists():
        base = load_base(model, "auto")
        try:
            permute_llama(base, seed)
        except ValueError as error:
            raise UserError(f"permute: {error}.") from None
        temporary = folder.with_name(folder.name + f".tmp-{time.monotonic_ns()}")
        with quiet():
            base.save_pretrained(temporary)
            load_tokenizer(model).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            import shutil

            shutil.rmtree(temporary)
    return str(folder)


def execute(planned: Planned, output: Path, permute: bool) -> dict[str, Any]:
    """Do one run (continuing one that was cut) and return its row. Errors become the row's `error`."""
    config, start = planned.config, time.perf_counter()
    row: dict[str, Any] = {"id": planned.id, "arm": planned.arm, "replicate": planned.replicate, "status": "done"}
    row["config"] = json.dumps(run.as_dict(config), sort_keys=True)
    try:
        if permute:
            (output / "bases").mkdir(exist_ok=True)
            config = config.replace(model=permuted_base(config.model, config.seed, output / "bases" / f"{config.seed}"))
        if (Path(config.output) / run.CONFIG_FILE).exists():
            config = run.resumed_config(config.replace(resume=True), {"output"})
        trainer = run.run(config).trainer
        before, after = run.held_out(trainer.records)
        from .loop import peak_bytes
        from .peft_io import storage

        sizes = storage(trainer.model)
        row |= {"loss_before": before, "loss_after": after, "tokens": trainer.tokens}
        row |= {"peak_bytes": peak_bytes(trainer.device), "weight_bytes": sum(sizes.values()) - sizes["adapters"]}
        if not trainer.finished:
            row |= {"status": "stopped"}
    except Exception as error:  # one bad run must not end the study; its reason stands in the table
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return row | {"seconds": time.perf_counter() - start, "finished": time.strftime("%Y-%m-%dT%H:%M:%S")}


def store(database: sqlite3.Connection, row: dict[str, Any]) -> None:
    columns = ", ".join(row)
    marks = ", ".join("?" * len(row))
    with database:
        database.execute(f"INSERT OR REPLACE INTO runs ({columns}) VALUES ({marks})", list(row.values()))


def _initialize(devices: Any) -> None:
    import os

    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())
    import torch

    torch.set_num_threads(1)


def run_study(study: Study, output: Path, jobs: int, note: Any = print) -> int:
    """Run what is not done yet. Returns the number of runs that failed. Ctrl-C loses at most the runs in hand."""
    database = connect(output)
    done = finished(database)
    waiting = [p for p in study.runs if p.id not in done]
    note(f"{len(study.runs)} runs, {len(study.runs) - len(waiting)} done already")
    failed = 0

    def collect(row: dict[str, Any]) -> None:
        nonlocal failed
        store(database, row)
        failed += row["status"] == "failed"
        if row["status"] == "stopped":
            raise KeyboardInterrupt  # it left a checkpoint
        result = row.get("error") or f"held-out loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}"
        note(f"  {row['arm']} {row['replicate']}: {result} ({row['seconds']:.0f} s)")

    if jobs == 1:
        for planned in waiting:
            collect(execute(planned, output, study.permute))
        return failed
    context = get_context("spawn")
    devices = _gpu_queue(context, jobs)
    with ProcessPoolExecutor(jobs, context, _initialize, (devices,)) as pool:
        try:
            for future in as_completed([pool.submit(execute, p, output, study.permute) for p in waiting]):
                collect(future.result())
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)  # the runs in hand leave their checkpoints
            raise
    return failed


def _gpu_queue(context: Any, jobs: int) -> Any:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return None
    devices = context.Queue()
    for i in range(jobs):
        devices.put(i % count)
    return devices
