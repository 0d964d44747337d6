"""Products kept because memory allows: who decides, by what, and what a run says and saves of it."""

import json

import pytest
import torch
import yaml

from qlora_ref.cli import UserError
from qlora_ref.finetune import products, report, run
from qlora_ref.finetune.config import TrainConfig
from qlora_ref.finetune.loading import keeps_products
from qlora_ref.memory.architecture import read_config
from qlora_ref.memory.estimate import estimate
from qlora_ref.memory.models import hf_config

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
PLENTY, CPU = 2**50, torch.device("cpu")


@pytest.fixture
def settings(data_dir, tmp_path):
    data = data_dir / "instruct" / "llms_from_scratch" / "instruction-data.json.gz"
    return TrainConfig(
        model=str(data_dir / "weights" / "stories260K_hf"), data=str(data), output=str(tmp_path / "run"),
        device="cpu", max_examples=20, max_length=64, eval_size=4, batch_size=2, grad_accum=1, lora_rank=4, max_steps=2,
    )  # fmt: skip


@pytest.fixture
def memory(monkeypatch):
    """memory(n): n bytes are available, None: nobody knows."""

    def available(n: int | None) -> None:
        monkeypatch.setattr(products, "available_memory", lambda: n)

    available(PLENTY)
    return available


def startup(prepared: run.Prepared) -> str:
    return report.startup(prepared.config, prepared.trainer, prepared.dtype, prepared.memory_allows)


# --- who decides ----------------------------------------------------------------------------------------------------

CASES = {
    "memory": ({}, PLENTY, True),
    "no memory": ({}, 0, False),
    "nobody knows": ({}, None, False),
    "no checkpointing": ({"gradient_checkpointing": False}, PLENTY, False),
    "16-bit LoRA": ({"quant_type": "none"}, PLENTY, False),
    "asked for": ({"keep_products": True}, 0, True),
    "asked for, nobody knows": ({"keep_products": True}, None, True),
    "asked for, 16-bit LoRA": ({"keep_products": True, "quant_type": "none"}, 0, True),
    "refused": ({"keep_products": False}, PLENTY, False),
}


@pytest.mark.parametrize(("changes", "available", "kept"), CASES.values(), ids=CASES)
def test_a_flag_decides_and_without_one_memory(settings, memory, changes, available, kept):
    memory(available)
    prepared = run.prepare(settings.replace(**changes))
    assert prepared.config.keep_products is kept and prepared.trainer.config.keep_products is kept
    assert keeps_products(prepared.trainer.model) is kept
    assert prepared.memory_allows is (kept and "keep_products" not in changes)


def test_half_of_the_memory_is_enough_for_the_run_that_keeps_products(settings, memory):
    resolved = settings.replace(max_length=512, batch_size=64, dtype="fp32", keep_products=True)
    kept = estimate(read_config(settings.model), report.memory_settings(resolved))
    forgotten = estimate(read_config(settings.model), report.memory_settings(resolved.replace(keep_products=False)))
    needed = kept.needed + kept.host
    assert needed > forgotten.needed + forgotten.host and kept.host > 0
    asked = resolved.replace(dtype="auto", keep_products=None)
    for available, enough in ((2 * needed, True), (2 * needed - 1, False)):
        memory(available)
        assert run.prepare(asked).config.keep_products is enough


def test_a_card_keeps_nothing_by_itself(settings, memory):
    assert products.kept_by_default(settings, CPU)
    assert not products.kept_by_default(settings, torch.device("cuda"))


@pytest.mark.parametrize("config", [{"model_type": "unheard_of"}, hf_config("t5-3b")], ids=["unknown", "t5"])
def test_a_model_that_the_estimate_does_not_know_well_keeps_nothing(settings, memory, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not products.kept_by_default(settings.replace(model=str(tmp_path)), CPU)


def test_settings_that_the_estimate_refuses_keep_nothing(settings, memory):
    prepared = run.prepare(settings.replace(lora_targets="self_attn.q_proj"))  # it knows q_proj only
    assert prepared.config.keep_products is False


def test_an_impossible_wish_is_still_an_error(settings, memory):
    with pytest.raises(UserError, match="--keep-products is a kind of checkpointing"):
        run.prepare(settings.replace(keep_products=True, gradient_checkpointing=False))


# --- what a run says and saves --------------------------------------------------------------------------------------


def test_the_start_says_that_memory_allowed_it(settings, memory):
    assert "sdpa attention kept (memory allows; --no-keep-products)\n" in startup(run.prepare(settings))
    assert "sdpa attention kept\n" in startup(run.prepare(settings.replace(keep_products=True)))
    memory(None)
    assert "activations  computed again in backward\n" in startup(run.prepare(settings))


@pytest.mark.parametrize("available", [PLENTY, 0])
def test_a_run_saves_what_was_decided_and_resumes_with_it(settings, memory, available):
    memory(available)
    decided = available == PLENTY
    prepared = run.run(settings.replace(max_steps=1))
    saved = yaml.safe_load((prepared.trainer.output / run.CONFIG_FILE).read_text())
    assert saved["keep_products"] is decided
    memory(0 if decided else PLENTY)
    again = run.prepare(run.resumed_config(settings.replace(resume=True), {"output", "resume"}))
    assert again.config.keep_products is decided and keeps_products(again.trainer.model) is decided
    assert not again.memory_allows and "memory allows" not in startup(again)
    flag = settings.replace(resume=True, keep_products=not decided)
    assert run.prepare(run.resumed_config(flag, {"keep_products"})).config.keep_products is not decided


# --- the memory that is available -----------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """machine(files): a root folder with 8 GiB available, and these files besides."""

    def make(files: dict[str, str]):
        files = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n", **files}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def group(folder: str, limit: int | str, used: int = 0, cache: int = 0) -> dict[str, str]:
    files = {"max": f"{limit}\n", "current": f"{used}\n", "stat": f"anon 1\ninactive_file {cache}\nactive_file 7\n"}
    return {f"sys/fs/cgroup/{folder}memory.{name}": text for name, text in files.items()}


def group1(folder: str, limit: int, used: int = 0, cache: int = 0) -> dict[str, str]:
    """Of version 1."""
    stat = f"inactive_file 5\ntotal_inactive_file {cache}\n"
    files = {"limit_in_bytes": f"{limit}\n", "usage_in_bytes": f"{used}\n", "stat": stat}
    return {f"sys/fs/cgroup/memory/{folder}memory.{name}": text for name, text in files.items()}


GIB = 2**30
MACHINES = {
    "no limit": ({"proc/self/cgroup": "0::/\n"}, 8 * GIB),
    "version 1": ({"proc/self/cgroup": "4:memory:/x\n0::/\n", **group1("x/", 4 * GIB, 3 * GIB, GIB)}, 2 * GIB),
    "version 1, group around it": (
        {"proc/self/cgroup": "5:cpu,memory:/x/y\n", **group1("x/y/", 2**63 - 4096), **group1("", 5 * GIB, 4 * GIB)},
        GIB,
    ),
    "version 1, no limit": ({"proc/self/cgroup": "4:memory:/x\n", **group1("", 2**63 - 4096, GIB)}, 8 * GIB),
    "version 1 out of sight": ({"proc/self/cgroup": "4:memory:/x\n0::/\n"}, None),
    "container": ({"proc/self/cgroup": "0::/\n", **group("", 4 * GIB, 3 * GIB, GIB)}, 2 * GIB),
    "limit above what is there": ({"proc/self/cgroup": "0::/\n", **group("", 64 * GIB, GIB)}, 8 * GIB),
    "max": ({"proc/self/cgroup": "0::/a\n", **group("a/", "max", GIB)}, 8 * GIB),
    "own group": ({"proc/self/cgroup": "1:cpu:/z\n0::/a/b\n", **group("a/b/", 2 * GIB, GIB)}, GIB),
    "group around it": (
        {"proc/self/cgroup": "0::/a/b\n", **group("a/b/", "max"), **group("a/", 3 * GIB, GIB)},
        2 * GIB,
    ),
    "another's group": ({"proc/self/cgroup": "0::/a\n", **group("b/", GIB)}, 8 * GIB),
    "no control groups to read": ({}, None),
    "limit without use": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, None),
    "old kernel": ({"proc/meminfo": "MemTotal: 16777216 kB\n", "proc/self/cgroup": "0::/\n"}, None),
    "not a number": ({"proc/meminfo": "MemAvailable: much kB\n", "proc/self/cgroup": "0::/\n"}, None),
}


@pytest.mark.parametrize(("files", "available"), MACHINES.values(), ids=MACHINES)
def test_available_memory(machine, files, available):
    assert products.available_memory(machine(files)) == available


def test_another_system_says_nothing(tmp_path):
    assert products.available_memory(tmp_path) is None
