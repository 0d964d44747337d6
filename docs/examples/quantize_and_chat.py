"""Quantize a causal language model on load, keep the quantized copy, and talk to it.

    python docs/examples/quantize_and_chat.py MODEL --save quantized/ --prompt "Once upon a time"

MODEL is a folder or a hub name. The folder written by --save loads with a plain from_pretrained (after importing
qlora_ref.hf), bit for bit the same.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_ref.hf import QLoraConfig  # importing it registers the quantizer
from qlora_ref.nn import count_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--save", help="folder for the quantized model")
    parser.add_argument("--prompt", action="append", help="say this (may be repeated); without it, type")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = QLoraConfig(quant_type="nf4", double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        model = model.to("cuda")
    size = sum(t.nbytes for t in model.state_dict().values()) / 2**20
    print(f"{count_parameters(model)[0]:,} parameters in {size:.2f} MiB")
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)

    for prompt in args.prompt or iter(lambda: input("you: "), ""):
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            batch = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            batch = tokenizer(prompt, return_tensors="pt")
        batch = {k: v.to(model.device) for k, v in batch.items() if k != "token_type_ids"}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        out = model.generate(**batch, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=pad)
        print("model:", tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
