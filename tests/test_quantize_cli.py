"""`qlora-ref quantize --report`: the error is the one of the definition, and it lies where the paper puts it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_ref.cli import UserError
from qlora_ref.quantize_cli import main
from qlora_ref.reference.blockwise import dequantize_blockwise, quantize_blockwise
from qlora_ref.reference.codebook import NAMES, get_codebook


def test_stories260k_by_layer_and_in_all(data_dir, tmp_path, capsys):
    folder = data_dir / "weights" / "stories260K_hf"
    assert main(["--report", str(folder), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    expected = {n for n, t in tensors.items() if t.dim() == 2 and "embed" not in n and "norm" not in n}
    assert {layer["name"] for layer in report["layers"]} == expected and len(expected) == 35
    layer = report["layers"][0]
    w = tensors[layer["name"]]
    for kind in NAMES:  # against the definition, written out
        book = get_codebook(kind, 64)
        back = dequantize_blockwise(*quantize_blockwise(w, book, 64), book, 64, w.shape)
        relative = ((back.double() - w.double()).norm() / w.double().norm()).item()
        assert math.isclose(layer["types"][kind]["relative_rmse"], relative, rel_tol=1e-12)
    totals = {k: v["relative_rmse"] for k, v in report["total"]["types"].items()}
    assert totals["nf4"] < totals["int4"] < totals["fp4_bnb"]
    # a separate run of others printed 0.0922 as the mean of the 25 matrices that are not k or v (README of the data)
    square = [layer for layer in report["layers"] if "k_proj" not in layer["name"] and "v_proj" not in layer["name"]]
    assert round(sum(layer["types"]["nf4"]["relative_rmse"] for layer in square) / len(square), 4) == 0.0922
    assert report["total"]["types"]["nf4"]["bits_per_weight"] == 4.5
    out = capsys.readouterr().out
    assert all(kind in out for kind in NAMES) and layer["name"] in out


def test_double_quantization_is_counted(data_dir, tmp_path):
    file = data_dir / "weights" / "stories260K_hf" / "model.safetensors"
    assert main(["--report", str(file), "--double-quant", "--types", "nf4", "--json", str(tmp_path / "r.json")]) == 0
    bits = json.loads((tmp_path / "r.json").read_text())["total"]["types"]["nf4"]["bits_per_weight"]
    # 4 + 8/64 + at least 32/(64*256); small layers fill their groups badly and carry a mean of their own
    assert 4 + 8 / 64 + 32 / (64 * 256) < bits < 4.25


@pytest.mark.parametrize("arguments, sentence", [
    ([], "--report"),
    (["--report", "nowhere"], "no file or folder"),
    (["--report", ".", "--types", "nf5"], "unknown 4-bit data type 'nf5'"),
    (["--report", ".", "--block-size", "65"], "power of two in 32..4096, not 65"),
    (["--report", "{tmp}"], "no \\*.safetensors"),
    (["--report", "{tmp}/bad.safetensors"], "no file or folder"),
])  # fmt: skip
def test_mistakes_are_sentences(tmp_path, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        main([a.replace("{tmp}", str(tmp_path)) for a in arguments])


def test_damaged_empty_and_nonfinite_files(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        main(["--report", str(tmp_path / "bad.safetensors")])
    save_file({"a": torch.zeros(3)}, tmp_path / "flat.safetensors")
    with pytest.raises(UserError, match="no 2-D floating-point weights"):
        main(["--report", str(tmp_path / "flat.safetensors")])
    save_file({"layer": torch.full((2, 64), torch.inf)}, tmp_path / "inf.safetensors")
    with pytest.raises(UserError, match="layer: 128 of 128 weights are NaN or Inf"):
        main(["--report", str(tmp_path / "inf.safetensors")])
