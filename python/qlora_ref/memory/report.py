"""The report: tables as text, the same facts as JSON and CSV, and a stacked-bar figure. Writes are atomic."""

import csv
import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from tabulate import tabulate

from . import categories as row
from .cards import CARDS, Verdict, difference, ladder, paper_estimate, verdict
from .estimate import Estimate, estimate
from .settings import PAPER, PEFT, Settings, flags, preset

GB, GIB = 1e9, 2**30
SCHEMA = "qlora_ref.memory/1"
KEPT = "decoded weights kept (CUDA path)"
FRAGMENTATION, CONTEXT = "fragmentation (assumed)", "CUDA context, workspaces (assumed)"


def gb(size: float) -> str:
    return f"{size / GB:.2f}"


def both(size: float) -> list[str]:
    return [f"{size / GB:.3f}", f"{size / GIB:.3f}"]


def text(result: Estimate) -> str:
    """The whole report of one setup."""
    parts = [header(result), category_table(result), phase_table(result), card_table(result), preset_table(result)]
    parts += [ladder_table(result), notes(result)]
    return "\n\n".join(parts)


def header(result: Estimate) -> str:
    a, s = result.architecture, result.settings
    what = f"{a.name}: {a.parameters() / 1e9:.2f} B parameters, {s.batch} x {s.seq} tokens"
    changed = flags(s, Settings(seq=s.seq, batch=s.batch))
    if s.train == "full":
        return f"{what}, {s.weights}, every weight trained, {s.optimizer}\nshapes: {a.source}"
    trained = f"rank {s.rank} on {s.targets} linear layers ({s.adapter_dtype}), {s.optimizer}"
    double = " + double quantization" if s.quantized and s.double_quant else ""
    setup = f"{what}, {s.weights}{double}, {trained}{', paged' if s.paged else ''}"
    return f"{setup}\nflags other than the defaults: {' '.join(changed) or 'none'}\nshapes: {a.source}"


def category_table(result: Estimate) -> str:
    categories = result.categories
    rows = [
        [name, *both(categories[name]), f"{100 * categories[name] / result.needed:.1f} %"]
        for name in row.CATEGORIES
        if categories[name]
    ]
    rows.append(["= peak of tensors", *both(result.allocated), f"{100 * result.allocated / result.needed:.1f} %"])
    if result.kept:
        rows.append([KEPT, *both(result.kept), f"{100 * result.kept / result.needed:.1f} %"])
    extra = result.needed - result.allocated - result.kept - result.margin.context
    rows.append([FRAGMENTATION, *both(extra), f"{100 * extra / result.needed:.1f} %"])
    rows.append([CONTEXT, *both(result.margin.context), f"{100 * result.margin.context / result.needed:.1f} %"])
    rows.append(["= needed on the card", *both(result.needed), "100 %"])
    if result.host:
        rows.append(["paged states, in host memory", *both(result.host), ""])
    return table(rows, ["memory at the peak", "GB", "GiB", "share"], "lrrr")


def phase_table(result: Estimate) -> str:
    rows = [
        [phase, *both(result.phase_bytes(phase)), ("peak", "runner-up", *[""] * 9)[i]]
        for i, phase in enumerate(result.ranking)
    ]
    return table(rows, ["phase of the step", "GB", "GiB", ""], "lrrl")


def card_table(result: Estimate) -> str:
    rows = []
    for card in CARDS:
        v = verdict(result, card)
        remedy = "" if v.fits else " ".join(v.remedy) if v.remedy else "no flags would"
        rows.append([
            card.name, card.mib, card.example, "fits" if v.fits else "DOES NOT FIT", f"{v.slack / GB:+.2f}",
            v.longest_sequence or "-", v.largest_batch or "-", remedy,
        ])  # fmt: skip
    names = ["card", "MiB", "for example", "verdict", "left, GB", "longest seq", "largest batch", "would make it fit"]
    return table(rows, names, "lrllrrrl")


def presets(result: Estimate) -> list[tuple[str, Estimate]]:
    s = result.settings
    return [
        ("the paper's", estimate(result.architecture, preset(PAPER, s), result.margin)),
        ("PEFT's defaults", estimate(result.architecture, preset(PEFT, s), replace(result.margin, decoded=0))),
        ("as asked", result),
    ]


def preset_table(result: Estimate) -> str:
    """The paper's settings, PEFT's, and those asked for, each with the verdict of both 48 GB cards and the reason."""
    paper = paper_estimate(result.architecture, result.settings, result.margin)
    cards = [card for card in CARDS if card.name.startswith("48")]
    rows = []
    for name, setup in presets(result):
        verdicts = ["fits" if setup.needed <= card.size else "NO" for card in cards]
        rows.append([name, gb(setup.allocated), gb(setup.needed), *verdicts, reason(setup, paper)])
    names = ["settings", "tensors, GB", "needed, GB", *(card.name for card in cards), "more than the paper's"]
    return table(rows, names, "lrrlll")


def reason(setup: Estimate, paper: Estimate) -> str:
    """Where the bytes above the paper's setup are, and which choice put them there."""
    s = setup.settings
    why = {
        row.ADAPTERS: s.adapter_dtype if s.adapter_dtype != PAPER.adapter_dtype else "",
        row.GRADIENTS: s.adapter_dtype if s.adapter_dtype != PAPER.adapter_dtype else "",
        row.EMBEDDINGS: s.embedding_dtype if s.embedding_dtype != PAPER.embedding_dtype else "",
        row.STATES: "" if s.paged else "not paged",
        row.WORKING: f"dropout {s.dropout:g}, {s.embedding_dtype} activations" if s.dropout else "",
    }
    large = [(name, size) for name, size in difference(setup, paper) if size > 0.002 * paper.allocated]
    parts = [f"{name} +{gb(size)}" + (f" ({why[name]})" if why.get(name) else "") for name, size in large]
    return "; ".join(parts) or "-"


def ladder_table(result: Estimate) -> str:
    rows, before = [], None
    for name, setup in ladder(result.architecture, result.settings, result.margin):
        saved = "" if before is None else f"{(before - setup.allocated) / GB:+.2f}"
        rows.append([name, gb(setup.allocated), saved, gb(setup.host) if setup.host else ""])
        before = setup.allocated
    return table(rows, ["one feature at a time", "tensors, GB", "saves, GB", "in host memory, GB"], "lrrr")


def notes(result: Estimate) -> str:
    a, s = result.architecture, result.settings
    longer = estimate(a, Settings(**{**asdict(s), "seq": 2 * s.seq}), result.margin)
    per_token = (longer.allocated - result.allocated) / s.tokens
    out = [
        f"Each further token costs about {per_token / 1000:.0f} kB at this length.",
        f"Assumed, not measured: {100 * result.margin.fragmentation:g} % fragmentation and "
        f"{result.margin.context / GIB:.1f} GiB of context and workspaces (--fragmentation, --context-mib).",
    ]
    if a.experts and s.quantized:
        size = result.static[row.PLAIN]
        out.append(
            f"The experts ({gb(size)} GB) are fused 3-D parameters, no linear layers: they are not quantized and "
            f"carry no adapter. In 4 bits they would take {gb(size * 4.127 / 16)} GB."
        )
    if s.seq > a.max_position:
        out.append(f"{s.seq} tokens are more than the {a.max_position} positions {a.name} was trained with.")
    if a.encoder_decoder:
        out.append(
            "Encoder and decoder each get the whole sequence length, and every layer is counted as a decoder layer: "
            "the activations are an upper bound, not held to a trace."
        )
    return "\n".join(out)


def table(rows: list[list], headers: list[str], align: str) -> str:
    places = [{"l": "left", "r": "right"}[letter] for letter in align]
    return tabulate(rows, headers, tablefmt="simple", colalign=places, disable_numparse=True)


def facts(result: Estimate) -> dict:
    """Everything the text says, as JSON-able values in bytes."""
    return {
        "schema": SCHEMA,
        "model": result.architecture.name,
        "source": result.architecture.source,
        "parameters": result.architecture.parameters(),
        "settings": asdict(result.settings),
        "categories": {name: result.categories[name] for name in row.CATEGORIES},
        "static": result.static.total(),
        "phases": {phase: result.phase_bytes(phase) for phase in row.PHASES},
        "peak_phase": result.peak_phase,
        "runner_up": result.ranking[1],
        "allocated": result.allocated,
        "kept": result.kept,
        "needed": result.needed,
        "host": result.host,
        "margin": asdict(result.margin),
        "cards": [_card_facts(verdict(result, card)) for card in CARDS],
        "presets": {name: {"allocated": e.allocated, "needed": e.needed} for name, e in presets(result)},
        "ladder": {
            name: {"allocated": e.allocated, "host": e.host}
            for name, e in ladder(result.architecture, result.settings, result.margin)
        },
    }


def _card_facts(v: Verdict) -> dict:
    return {
        "card": v.card.name, "mib": v.card.mib, "fits": v.fits, "slack": v.slack,
        "longest_sequence": v.longest_sequence, "largest_batch": v.largest_batch, "remedy": v.remedy,
    }  # fmt: skip


def json_text(results: list[Estimate]) -> str:
    all_facts = [facts(result) for result in results]
    return json.dumps(all_facts[0] if len(all_facts) == 1 else all_facts, indent=2) + "\n"


def csv_text(results: list[Estimate]) -> str:
    """One line for each model, phase and category: model, phase, peak, category, bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "phase", "is_peak", "category", "bytes"])
    for result in results:
        for phase in row.PHASES:
            alive = result.static + result.phases[phase]
            for name in row.CATEGORIES:
                if alive[name]:
                    writer.writerow(
                        [result.architecture.name, phase, int(phase == result.peak_phase), name, alive[name]]
                    )
    return out.getvalue()


def side_by_side(results: list[Estimate]) -> str:
    """Categories of several models, in MB."""
    names = [name for name in row.CATEGORIES if any(result.categories[name] for result in results)]
    rows = [[name, *(f"{result.categories[name] / 1e6:.1f}" for result in results)] for name in names]
    rows.append(["peak, GB", *(f"{result.allocated / GB:.3f}" for result in results)])
    rows.append(["peak, GiB", *(f"{result.allocated / GIB:.3f}" for result in results)])
    rows.append(["needed, GB", *(f"{result.needed / GB:.3f}" for result in results)])
    headers = ["MB at the peak", *(result.architecture.name for result in results)]
    return table(rows, headers, "l" + "r" * len(results))


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write beside the target, then rename: a reader never sees half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
