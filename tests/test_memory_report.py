"""`qlora-ref estimate`: what it prints, writes and refuses; and the measurement on this CPU."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_ref.cli import UserError
from qlora_ref.memory import categories as row
from qlora_ref.memory import cli, models, report
from qlora_ref.memory.architecture import from_config
from qlora_ref.memory.estimate import estimate
from qlora_ref.memory.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["--model", "llama-65b", "--seq", "512", "--batch", "1", "--rank", "64"]
FP32 = {"compute_dtype": "fp32", "embedding_dtype": "fp32", "adapter_dtype": "fp32"}
DEMO = {  # the embedded model of `qlora-ref demo`, as it is trained there
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA_100M = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 16000, "max_position_embeddings": 2048,
}  # fmt: skip


def run(*argv, capsys):
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def test_the_headline(capsys):
    out = run(*COMMAND, capsys=capsys)
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert " fits " in lines["48 GB, ECC on"] and " fits " in lines["48 GB, ECC off"]
    assert "DOES NOT FIT" in lines["24 GB"] and "--paged" in lines["40 GB"]
    assert "NO" not in lines["the paper's"].split("  ")
    peft = lines["PEFT's defaults"]
    assert "NO" in peft and "adapters +1.60 (fp32)" in peft and "embeddings and head +1.05 (fp32)" in peft
    assert "first layer backward" in out and "runner-up" in out


def test_the_script_loads_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['memory_report.py', '--model', 'llama-65b']\n"
        "try: runpy.run_path('tools/memory_report.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needed on the card" in done.stdout


def test_json_and_csv_say_the_same_as_the_estimate(capsys, tmp_path):
    target = tmp_path / "facts.json"
    run(*COMMAND, "--json", str(target), capsys=capsys)
    facts, result = json.loads(target.read_text()), estimate(models.model("llama-65b"), Settings())
    assert facts["schema"] == report.SCHEMA and facts["allocated"] == result.allocated
    assert facts["needed"] == result.needed and sum(facts["categories"].values()) == result.allocated
    assert [card["fits"] for card in facts["cards"]] == [False, False, False, True, True, True, True]
    rows = list(csv.DictReader(io.StringIO(run(*COMMAND, "--csv", "-", capsys=capsys))))
    for phase in row.PHASES:
        assert sum(int(r["bytes"]) for r in rows if r["phase"] == phase) == facts["phases"][phase]
    assert list(tmp_path.iterdir()) == [target]  # nothing temporary is left


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_figure(capsys, tmp_path, ending):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from qlora_ref.memory.figure import bars

    files = [tmp_path / f"{i}.{ending}" for i in range(2)]
    for file in files:
        run("--model", "llama-7b", "llama-65b", "--figure", str(file), capsys=capsys)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    result = estimate(models.model("llama-65b"), Settings())
    assert sum(bars(result).values()) == pytest.approx(result.needed / 1e9)


def test_several_models_side_by_side(capsys):
    out = run("--model", "llama-7b", "llama-13b", capsys=capsys)
    assert "5.974" in out and "10.47" in out


def test_a_config_file_and_a_folder(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(models.hf_config("llama-7b")))
    for argument in (("--config", str(tmp_path)), ("--model", str(tmp_path / "config.json"))):
        assert "6.74 B parameters" in run(*argument, capsys=capsys)


def test_notes(capsys):
    assert "not quantized" in run("--model", "mixtral-8x7b", capsys=capsys)
    assert "positions" in run("--model", "llama-7b", "--seq", "4096", capsys=capsys)
    assert "upper bound" in run("--model", "t5-3b", capsys=capsys)
    listed = run("--list-models", capsys=capsys)
    assert all(name in listed for name in models.names())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Give --model NAME"),
        (["--model", "lama-65B"], "nearest are llama-65b"),
        (["--model", "zzz"], "known families"),
        (["--model", "no/such/folder"], "There is no no/such/folder"),
        (["--model", "meta-llama/Llama-2-7b-hf"], "nothing is fetched from a hub.*: the nearest are llama-2-7b"),
        (["--model", ""], "is empty"),
        (["--model", "llama-7b", "--fragmentation", "nan"], "a share of the tensors"),
        (["--model", "llama-7b", "--fragmentation", "inf"], "a share of the tensors"),
        (["--model", "llama-7b", "--json", "-", "--csv", "-"], "would mix"),
        (["--model", "llama-7b", "--json", "/tmp"], "that is a folder"),
        (["--model", "llama-7b", "--seq", "many"], "invalid int value"),
        (["--model", "llama-7b", "--sequence", "5"], "unrecognized arguments"),
        (["--model", "llama-7b", "--weights", "bf16", "--double-quant"], "no quantization constants"),
        (["--model", "llama-7b", "--figure", "memory.gif"], "must end in .png or .svg"),
        (["--model", "llama-7b", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--model", "llama-7b", "--fragmentation", "-1"], "cannot be negative"),
        (["--model", "t5-small", "--compare", "trace"], "encoder-decoder"),
        (["--model", "llama-7b", "--optimizer", "adamw8", "--state-block", "100"], "straddle"),
    ],
)
def test_refusals_are_one_sentence(argv, message):
    with pytest.raises(UserError, match=message) as error:
        cli.main(argv)
    assert "\n" not in str(error.value)


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
def test_compare_trace_prints_both(capsys, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text(json.dumps(DEMO))
    out = run("--config", str(tmp_path), "--compare", "trace", capsys=capsys)
    assert "estimate / trace - 1 = " in out and "trace, GB" in out and "needed on the card" in out


def test_a_comparison_does_not_mix_with_facts_on_standard_output(capsys, monkeypatch):
    monkeypatch.setattr(cli, "compare", lambda *_: "the comparison")
    assert cli.main(["--model", "llama-7b", "--compare", "trace", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "llama-7b" and err.startswith("the comparison")


def _measured(config, reading, **settings):
    """(measured, expected) bytes of one reading in a fresh process."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from qlora_ref import native
    from qlora_ref.memory.measure import cpu_expected, measure_cpu

    if native.cpu is None:
        pytest.skip("the C++ kernels are not built; the reference's temporaries are not part of the estimate")
    s = Settings(**{**FP32, **settings})
    value = measure_cpu(config, s, (reading,)).values[reading]
    return value, cpu_expected(estimate(from_config(config), s))


@pytest.mark.hf
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
def test_resident_memory_of_the_demo_model():
    measured, expected = _measured(DEMO, "resident growth", seq=192, batch=8, rank=16)
    assert expected == pytest.approx(measured, rel=0.05)


@pytest.mark.hf
@pytest.mark.slow
@pytest.mark.parametrize("reading", ["CPU allocator", "resident growth"])
@pytest.mark.parametrize("name", ["demo", "100M"])
def test_memory_on_a_cpu(name, reading):
    config, work = {"demo": (DEMO, {"seq": 192, "batch": 8}), "100M": (LLAMA_100M, {"seq": 256})}[name]
    measured, expected = _measured(config, reading, rank=16, **work)
    assert expected == pytest.approx(measured, rel=0.05 if reading == "resident growth" else 0.005)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("llama-7b", 8e9), ("llama-33b", None), ("llama-65b", 48e9)])
def test_three_steps_on_a_gpu(name, limit):
    """Random weights, three steps: the allocator's peak within 5 % of the estimate, 7B under 8 GB, 65B under 48 GB."""
    torch = pytest.importorskip("torch")
    from qlora_ref.memory.measure import measure

    result = estimate(models.model(name), Settings())
    if torch.cuda.mem_get_info()[0] < result.needed:
        pytest.skip(f"{name} needs {result.needed / 1e9:.0f} GB of free GPU memory")
    measured = measure(models.hf_config(name), result.architecture, Settings(), "cuda")
    allocated = measured.values["allocated"]
    assert result.allocated + result.kept == pytest.approx(allocated, rel=0.05)
    assert limit is None or measured.values["used on the card"] < limit


@pytest.mark.hf
def test_measure_without_a_gpu_says_what_to_do():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="sees no CUDA GPU here; use --device cpu"):
        cli.main(["--model", "llama-7b", "--compare", "measure"])
