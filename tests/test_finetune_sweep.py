"""Sweeps: permutations that preserve the function, paired statistics, a grid that resumes, a table that says why."""

import json
import math
import sqlite3

import pytest
import torch

from qlora_ref import cli
from qlora_ref.cli import UserError
from qlora_ref.finetune import sweep, sweep_cli
from qlora_ref.finetune.statistics import compare

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def grid(data_dir, tmp_path):
    data = str(data_dir / "instruct" / "llms_from_scratch" / "instruction-data.json.gz")
    base = {
        "model": str(data_dir / "weights" / "stories260K_hf"),
        "data": data, "eval_data": data,
        "device": "cpu", "max_examples": 40, "max_length": 64, "max_eval_examples": 8, "batch_size": 4, "grad_accum": 1,
        "lora_rank": 4, "lr": 3e-3, "max_steps": 2, "eval_steps": 2,
    }  # fmt: skip
    content = {
        "base": base,
        "arms": {"lora16": {"quant_type": "none"}, "nf4": {"double_quant": False}},
        "grid": {"seed": [0, 1]},
        "permute": True,
        "compare": {"baseline": "lora16", "margin": 0.05},
    }

    def write(**changes):
        path = tmp_path / "grid.yaml"
        path.write_text(json.dumps({**content, **changes}))  # JSON is YAML
        return path

    return write


def test_a_permutation_changes_the_weights_and_not_the_function(data_dir):
    from qlora_ref.finetune.loading import load_base
    from qlora_ref.finetune.permute import permute_llama

    model = load_base(str(data_dir / "weights" / "stories260K_hf"), torch.float64)
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        weights = {n: p.clone() for n, p in model.named_parameters()}
        permute_llama(model, seed=3)
        after = model(ids).logits
    torch.testing.assert_close(after.float(), before.float())  # the norms sum in float32, in another order
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert {n for n in weights if "proj" in n or "embed" in n} <= changed
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="only Llama-shaped"):
        permute_llama(model, 0)


def test_paired_statistics_against_scipy():
    from scipy import stats

    generator = torch.Generator().manual_seed(1)
    base = torch.randn(9, generator=generator).tolist()
    arm = [b + 0.02 + 0.01 * e for b, e in zip(base, torch.randn(9, generator=generator).tolist(), strict=True)]
    result = compare(dict(enumerate(arm)), dict(enumerate(base)), margin=0.05)
    assert math.isclose(result.p_difference, stats.ttest_rel(arm, base).pvalue)
    interval = stats.ttest_rel(arm, base).confidence_interval(0.95)
    assert math.isclose(result.low, interval.low) and math.isclose(result.high, interval.high)
    d = [a - b for a, b in zip(arm, base, strict=True)]
    lower = stats.ttest_1samp(d, -0.05, alternative="greater").pvalue
    upper = stats.ttest_1samp(d, 0.05, alternative="less").pvalue
    assert math.isclose(result.p_equivalence, max(lower, upper)) and result.equivalent
    assert not compare(dict(enumerate(arm)), dict(enumerate(base)), margin=result.mean).equivalent
    assert math.isnan(compare({0: 1.0}, {0: 1.0}, 0.1).p_equivalence)


def test_tost_holds_its_level_at_the_margin():
    """True difference = margin: equivalence may be claimed in 5 % of studies; 1000 studies, 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    n = 1000
    d = 0.1 + 0.1 * torch.randn(n, 6, generator=generator, dtype=torch.float64)
    claimed = sum(compare(dict(enumerate(row)), dict.fromkeys(range(6), 0.0), 0.1).equivalent for row in d.tolist())
    assert abs(claimed / n - 0.05) < 5 * math.sqrt(0.05 * 0.95 / n)


def test_runs_of_a_study_keep_products_only_where_it_says_so(grid, tmp_path):
    """Not by the memory of the moment: their peaks are compared, and several may start at once."""
    study = sweep.load_study(
        grid(arms={"plain": {}, "null": {"keep_products": None}, "kept": {"keep_products": True}}, compare={}), tmp_path
    )
    assert {p.arm: p.config.keep_products for p in study.runs} == {"plain": False, "null": False, "kept": True}


def test_a_sweep_runs_resumes_and_summarises(grid, tmp_path, capsys, monkeypatch):
    output = tmp_path / "sweep"
    argv = [str(grid()), "--output", str(output)]
    real, done = sweep.execute, []

    def interrupted(planned, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(planned.arm)
        return real(planned, *rest)

    monkeypatch.setattr(sweep, "execute", interrupted)
    assert sweep_cli.main(argv) == 130
    monkeypatch.setattr(sweep, "execute", lambda planned, *rest: (done.append(planned.arm), real(planned, *rest))[1])
    assert sweep_cli.main(argv) == 0
    assert len(done) == 4 and sorted(done) == ["lora16", "lora16", "nf4", "nf4"]  # nothing was run twice
    assert "3 done already" in capsys.readouterr().out
    rows = sqlite3.connect(output / "sweep.sqlite").execute(
        "SELECT arm, replicate, loss_before, loss_after, weight_bytes FROM runs ORDER BY arm, replicate"
    )
    table = {(arm, json.loads(rep)["seed"]): rest for arm, rep, *rest in rows}
    assert all(after < before for before, after, _ in table.values())
    # permuted bases compute the same: 16-bit losses agree before training, quantized ones do not
    assert math.isclose(table["lora16", 0][0], table["lora16", 1][0], rel_tol=1e-5)
    assert abs(table["nf4", 0][0] - table["nf4", 1][0]) > 1e-3
    assert table["nf4", 0][2] < table["lora16", 0][2]
    summary = json.loads((output / "summary.json").read_text())
    expected = [table["nf4", s][1] - table["lora16", s][1] for s in (0, 1)]
    assert math.isclose(summary["arms"]["nf4"]["after_difference"]["mean"], sum(expected) / 2)
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["sweep", *argv, "--summary"]) == 0


def test_a_failing_run_does_not_end_the_sweep(grid, tmp_path, capsys):
    output = tmp_path / "sweep"
    path = grid(arms={"good": {}, "bad": {"lora_targets": "query"}}, grid={"seed": [0]}, permute=False, compare={})
    assert sweep_cli.main([str(path), "--output", str(output)]) == 1
    out = capsys.readouterr().out
    assert "candidates are" in out and "good" in out
    status = dict(sqlite3.connect(output / "sweep.sqlite").execute("SELECT arm, status FROM runs"))
    assert status == {"good": "done", "bad": "failed"}


@pytest.mark.parametrize("change, sentence", [
    ({"gird": {}}, "unknown section 'gird'. Did you mean grid?"),
    ({"arms": {"a": {"lora_rnk": 1}}}, "Did you mean lora_rank?"),
    ({"grid": {"sed": [1]}}, "Did you mean seed?"),
    ({"grid": {"lora_rank": [0]}}, "--lora-rank must be at least 1"),
    ({"compare": {"baseline": "lora"}}, "is not an arm. Did you mean lora16?"),
    ({"arms": [1]}, "arms must be a mapping"),
])  # fmt: skip
def test_bad_grids(grid, tmp_path, change, sentence):
    with pytest.raises(UserError) as error:
        sweep_cli.main([str(grid(**change)), "--output", str(tmp_path / "s")])
    assert sentence in str(error.value) and not (tmp_path / "s").exists()
