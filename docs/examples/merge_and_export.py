"""An adapter and its base -> an ordinary 16-bit model, or a bitsandbytes checkpoint of the base.

    python docs/examples/merge_and_export.py MODEL adapter/ merged/
    python docs/examples/merge_and_export.py MODEL adapter/ merged/ --bnb base-bnb/

merged/ needs neither PEFT nor qlora_ref; convert it further with, for example, llama.cpp's convert_hf_to_gguf.py.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_ref import hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the base the adapter was trained on")
    parser.add_argument("adapter")
    parser.add_argument("output")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--bnb", help="also write the 4-bit base as a bitsandbytes checkpoint here")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=hf.QLoraConfig(), dtype=torch.bfloat16 if torch.cuda.is_available() else "auto"
    )
    if args.bnb:
        hf.save_bnb(base, args.bnb)
        tokenizer.save_pretrained(args.bnb)
    model = hf.load_adapter(base, args.adapter).eval()
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits.float().log_softmax(-1)
        merged = hf.merge(model, dtype)
        after = merged(input_ids=ids).logits.float().log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    print(f"KL(adapter on 4 bits || merged in {args.dtype}): {divergence:.3g} nats a token")
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
