"""The definition of QLoRA in plain PyTorch. Every native function of this project equals one function in here.

Reading order, and where the paper (Dettmers et al. 2023, arXiv 2305.14314) says it:

    codebook.py      16 levels of a 4-bit data type; NF4 from normal quantiles        section 3, Appendix E
    packing.py       two 4-bit codes in one byte
    blockwise.py     absmax blocks: weights -> codes -> weights                       equations 1-2
    double_quant.py  the absmax of the blocks, quantized again to 8 bits              section 3, "Double Quantization"
    lora.py          the low-rank adapter and its scaling                             equation 3
    linear.py        forward and backward through frozen 4-bit weights                equations 5-6
    adamw.py         the optimizer, operation by operation
    paging.py        optimizer states that do not fit: pages, sweeps, faults          section 3, "Paged Optimizers"

This package imports torch, numpy and scipy and nothing else of ours. All arithmetic is IEEE float32, round to nearest
even, subnormals kept, unless a line says otherwise: that is what makes "equal bit for bit" possible elsewhere.
"""
