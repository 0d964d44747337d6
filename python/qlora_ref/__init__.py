"""qlora_ref: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), as a reference, as kernels, and as a tool.

Start reading in `qlora_ref.reference`. Importing this package imports neither transformers nor peft.
"""

__version__ = "0.1.0"
