"""`qlora-ref quantize --report FILE_OR_DIR`: what 4 bits cost each layer of a checkpoint, by data type.

For every 2-D floating-point weight W of a safetensors file: W' = dequantize(quantize(W)) in float32 and

    relative RMSE = |W' - W| / |W|  (Frobenius norms),      bits a weight as stored

per data type; at the end the mean of the layers, and the same over all weights together. Embeddings and norms are left
out, as in fine-tuning.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .cli import UserError
from .finetune.flags import Parser
from .quantized import QuantConfig, QuantizedTensor
from .reference.codebook import NAMES

SKIPPED = ("embed", "wte", "wpe", "norm", "lm_head")


def main(argv: list[str]) -> int:
    parser = Parser(prog="qlora-ref quantize", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--report", required=True, metavar="PATH", help="a .safetensors file, or a folder of them")
    parser.add_argument(
        "--types", default=",".join(NAMES), help=f"data types, comma-separated (default: {','.join(NAMES)})"
    )
    parser.add_argument("--block-size", type=int, default=64, help="weights per block, a power of two in 32..4096 (64)")
    parser.add_argument(
        "--double-quant", action="store_true", help="quantize the block maxima too (where the type can)"
    )
    parser.add_argument("--all", action="store_true", help="include embeddings and the output layer")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    configs = type_configs(args.types.split(","), args.block_size, args.double_quant)
    files = weight_files(Path(args.report))
    if args.json and Path(args.json).exists():
        raise UserError(f"--json {args.json} exists; name a new file.")
    layers = [measure(name, w, configs) for name, w in weights(files, args.all)]
    if not layers:
        raise UserError(f"{args.report} holds no 2-D floating-point weights outside embeddings (--all includes those).")
    report = {"source": args.report, "block_size": args.block_size, "layers": layers, "total": total(layers, configs)}
    print(table(report, list(configs)))
    if args.json:
        from .finetune.peft_io import write_json

        write_json(Path(args.json), report)
        print(f"written: {args.json}")
    return 0


def type_configs(names: list[str], block_size: int, double_quant: bool) -> dict[str, QuantConfig]:
    """One QuantConfig per type; a signed type keeps its absmax in float32. UserError for a bad name or block size."""
    configs = {}
    for name in names:
        try:
            flat = QuantConfig(name, block_size, double_quant=False)
            signed = name.endswith("_s")
            configs[name] = QuantConfig(name, block_size) if double_quant and not signed else flat
        except ValueError as error:
            raise UserError(f"{error}.") from None
    return configs


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a path, sorted. UserError if there are none."""
    if not path.exists():
        raise UserError(f"there is no file or folder {path}.")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no *.safetensors files.")
    return files


def weights(files: list[Path], everything: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """2-D float weights one at a time (a layer in memory, never the model). UserError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    floats = (torch.float32, torch.bfloat16, torch.float16)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    if not everything and any(word in name for word in SKIPPED):
                        continue
                    tensor = file.get_tensor(name)
                    if tensor.dim() == 2 and tensor.dtype in floats and tensor.numel():
                        yield name, tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}.") from None


def measure(name: str, weight: torch.Tensor, configs: dict[str, QuantConfig]) -> dict[str, Any]:
    """Squared error and squared weight (float64 sums), relative RMSE and bits a weight of one layer, by data type."""
    exact = weight.double()
    power = exact.square().sum().item()
    types = {}
    for kind, config in configs.items():
        try:
            quantized = QuantizedTensor.quantize(weight, config)
        except ValueError as error:
            raise UserError(f"{name}: {error}.") from None
        error2 = (quantized.dequantize(torch.float32).double() - exact).square().sum().item()
        relative = math.sqrt(error2 / power) if power else 0.0
        types[kind] = {"relative_rmse": relative, "squared_error": error2, "bytes": quantized.nbytes}
    return {"name": name, "shape": list(weight.shape), "squared_weight": power, "types": types}


def total(layers: list[dict[str, Any]], configs: dict[str, QuantConfig]) -> dict[str, Any]:
    """Over all layers: relative RMSE of the concatenated weights, stored bits a weight."""
    count = sum(math.prod(layer["shape"]) for layer in layers)
    power = sum(layer["squared_weight"] for layer in layers)
    types = {}
    for kind in configs:
        error2 = sum(layer["types"][kind]["squared_error"] for layer in layers)
        stored = sum(layer["types"][kind]["bytes"] for layer in layers)
        types[kind] = {
            "relative_rmse": math.sqrt(error2 / power) if power else 0.0,
            "mean_of_layers": sum(layer["types"][kind]["relative_rmse"] for layer in layers) / len(layers),
            "bits_per_weight": 8 * stored / count,
        }
    return {"weights": count, "types": types}


def table(report: dict[str, Any], kinds: list[str]) -> str:
    from tabulate import tabulate

    rows = [
        [layer["name"], "x".join(map(str, layer["shape"])), *(layer["types"][k]["relative_rmse"] for k in kinds)]
        for layer in report["layers"]
    ]
    everything = report["total"]
    summary = {
        "mean of the layers": "mean_of_layers",
        "all together": "relative_rmse",
        "bits a weight": "bits_per_weight",
    }
    for label, key in summary.items():
        rows.append([label, "", *(everything["types"][k][key] for k in kinds)])
    headers = ["relative RMSE", "shape", *kinds]
    return tabulate(rows, headers, floatfmt=".4f", disable_numparse=[0, 1])
