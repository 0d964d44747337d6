"""lm-evaluation-harness on a loaded model with an adapter, offline, with a task over local data."""

import importlib.util
import json

import pytest
import torch

from evaluation_models import byte_tokenizer, tiny_llama
from qlora_ref.evaluation.harness import harness_model, run_harness

pytestmark = pytest.mark.hf
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HAS_HARNESS, reason="lm-evaluation-harness is not installed (pip install lm_eval)"
)

TASK = """
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: ["yes", "no"]
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.skipif(HAS_HARNESS, reason="lm-evaluation-harness is installed")
def test_its_absence_is_a_sentence():
    with pytest.raises(RuntimeError, match="pip install lm_eval"):
        harness_model(None, None)


@needs_harness
@pytest.mark.filterwarnings("ignore")  # other people's code
def test_harness_runs_on_a_model_with_an_adapter(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    adapter = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(tiny_llama(256), adapter).eval()
    docs = [{"question": f"Question {i}?", "gold": i % 2} for i in range(12)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "made_up.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    results = run_harness(model, tokenizer, ["made_up"], batch_size=3, include_path=tmp_path)

    def log_likelihood(question, answer):
        context = tokenizer(question)["input_ids"]
        ids = torch.tensor([tokenizer(f"{question} {answer}")["input_ids"]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(log_p[t - 1, ids[0, t]].item() for t in range(len(context), ids.shape[1]))

    right = [(log_likelihood(d["question"], "no") > log_likelihood(d["question"], "yes")) == d["gold"] for d in docs]
    assert results["made_up"]["acc,none"] == sum(right) / len(docs)
    with pytest.raises(ValueError, match="knows no task nonsense"):
        run_harness(model, tokenizer, ["nonsense"], include_path=tmp_path)
