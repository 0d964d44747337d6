"""Models to talk to: a base, or an adapter on its base, loaded when first asked for; one is in memory at a time.

Switching between adapters of the same base swaps the adapter only. Used by generate, chat, serve, merge and export.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cli import UserError
from ..nn import LoRALinear, quantize_model
from ..quantized import QuantConfig
from .encode import prompt_ids
from .formats import Example
from .generate import Sampling, generate_ids
from .loading import check_model_folder, load_base, load_tokenizer, resolve_device, resolve_dtype, show_dtypes
from .peft_io import AdapterError, attach_adapter, read_adapter

SINGLE_TURN = ("alpaca", "plain")


@dataclass(frozen=True)
class Served:
    """A name that can be asked for: base folder, its quantization (None: 16-bit), adapter or none, template."""

    name: str
    base: str
    quantization: QuantConfig | None
    adapter: str | None
    template: str


@dataclass
class Engine:
    """`use(name)` loads what is named; `stream` generates with it. One generation at a time (`lock`)."""

    served: dict[str, Served]
    device: torch.device
    dtype: torch.dtype
    lock: threading.Lock = field(default_factory=threading.Lock)
    model: Any = None
    tokenizer: Any = None
    current: Served | None = None

    def use(self, name: str) -> Served:
        """Load model `name` (KeyError if it is not served). Call with the lock held."""
        wanted = self.served[name]
        if wanted == self.current:
            return wanted
        now = self.current
        if now is None or (now.base, now.quantization) != (wanted.base, wanted.quantization):
            self.model = self.tokenizer = self.current = None  # free the old one before the new one comes
            self.model, self.tokenizer = load_quantized(wanted, self.device, self.dtype)
        else:
            detach_adapter(self.model)
        if wanted.adapter:
            try:
                attach_adapter(self.model, wanted.adapter)
                show_dtypes(self.model)
            except AdapterError as error:
                self.model = self.current = None
                raise UserError(str(error)) from None
        self.model.eval()
        self.current = wanted
        return wanted

    def prompt(self, messages: Example) -> list[int]:
        """Ids of a conversation. UserError if a message spells out a special token, which a template would obey."""
        assert self.current is not None
        if self.current.template == "chat":
            for token in self.tokenizer.all_special_tokens:
                if any(token in m.text or token in m.context for m in messages):
                    raise UserError(f"a message contains the special token {token}, which could forge a turn.")
        ids = prompt_ids(messages, self.current.template, self.tokenizer)
        return [*ids, self.tokenizer.eos_token_id] if self.model.config.is_encoder_decoder else ids

    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    def stream(self, ids: list[int], sampling: Sampling, cancelled: threading.Event) -> Iterator[str]:
        """Pieces of text as they are generated; stops early when `cancelled` is set. Call with the lock held."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        class Cancelled(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), cancelled.is_set(), device=input_ids.device)

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        self.generated: list[int] = []

        def work() -> None:
            try:
                stop = StoppingCriteriaList([Cancelled()])
                self.generated = generate_ids(self.model, self.tokenizer, ids, sampling, streamer, stop)
            except BaseException as error:  # handed to the reader of the stream
                failure.append(error)
            finally:
                streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from (text for text in streamer if text)
        finally:
            cancelled.set()
            worker.join()
        if failure:
            raise failure[0]


def load_quantized(wanted: Served, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model on `device`, tokenizer) of a base folder, quantized as asked."""
    tokenizer = load_tokenizer(wanted.base)
    model = load_base(wanted.base, dtype)
    if wanted.quantization is not None:
        try:
            quantize_model(model, wanted.quantization)
        except (ValueError, TypeError) as error:
            raise UserError(f"{wanted.base}: {error}") from None
    return model.to(device), tokenizer


def detach_adapter(model: torch.nn.Module) -> None:
    """Put the bare base layers back in place of every `LoRALinear`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


def describe_base(folder: str, quant_type: str, template: str) -> Served:
    """A base model as it will be served; its template is its own chat template where it has one, else plain text."""
    from . import run
    from .config import TrainConfig

    folder = run.embedded(TrainConfig(model=folder)).model
    check_model_folder(folder)
    if template == "auto":
        template = "chat" if getattr(load_tokenizer(folder), "chat_template", None) else "plain"
    quantization = None if quant_type == "none" else QuantConfig(quant_type)
    return Served(Path(folder).resolve().name, folder, quantization, None, template)


def describe_adapter(folder: str, base: str | None, template: str) -> Served:
    """An adapter with the base, quantization and template that it was trained with."""
    try:
        config, _, side = read_adapter(folder)
    except AdapterError as error:
        raise UserError(str(error)) from None
    base = base or str(config.get("base_model_name_or_path") or "")
    if not Path(base).is_dir():
        raise UserError(f"the base model of {folder}, {base!r}, is not a folder here; name it with --model.")
    check_model_folder(base)
    kept = side.get("quantization")
    quantization = QuantConfig(**kept) if kept else None
    template = side.get("template", "alpaca") if template == "auto" else template
    return Served(Path(folder).resolve().name, base, quantization, folder, template)


def make_engine(
    models: list[str], adapters: list[str], quant_type: str, template: str, device: str, dtype: str = "auto"
) -> Engine:
    """Everything that is named, by its folder name (a taken name gets a number). UserError if nothing is."""
    if not models and not adapters:
        raise UserError("name a model folder with --model, or an adapter folder with --adapter.")
    where = resolve_device(device)
    base = models[0] if models else None
    found = [describe_adapter(a, base if adapters and len(models) == 1 else None, template) for a in adapters]
    found += [describe_base(m, quant_type, template) for m in models]
    if adapters and not models:
        first = found[0]
        found.append(Served(Path(first.base).resolve().name, first.base, first.quantization, None, first.template))
    served: dict[str, Served] = {}
    for one in found:
        name, number = one.name, 2
        while name in served:
            name, number = f"{one.name}-{number}", number + 1
        served[name] = Served(name, one.base, one.quantization, one.adapter, one.template)
    return Engine(served, where, resolve_dtype(dtype, where))
