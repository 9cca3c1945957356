"""Functions that generated code calls, each with what the compiler has to know of it in the same file.

attention.py          causal attention: fused kernels, or blocks of queries
fused.py              the fused kernels of attention, by name: what each needs
choice.py             which of them is the fastest here
written_attention.py  puts these in the place of attention that a model writes out, or that has a mask
rms_norm.py           RMSNorm
cross_entropy.py      what is known of chunk_linear_cross_entropy.py, which stands at the top and needs only PyTorch
"""
