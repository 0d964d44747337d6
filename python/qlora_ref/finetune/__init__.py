"""Fine-tuning: data, prompts, the training loop, checkpoints, adapters in PEFT's format, generation, merge and export.

Reading order: `config` (what can be set), `files` -> `formats` -> `prompts` -> `encode` (a row becomes tokens and a
loss mask), `batches` (tokens become batches), `loading` (a folder becomes a 4-bit model with adapters), `loop` (the
training itself), `checkpoint` and `peft_io` (what is written), `train_cli` and `demo_cli` (the verbs).
"""
