"""Functions that generated code calls, each with what the compiler has to know of it in the same file.

attention.py          causal attention: fused kernels, or blocks of queries
fused.py              the fused kernels of attention, by name: what each needs
choice.py             which of them is the fastest here
written_attention.py  puts these in the place of attention that a model writes out, or that has a mask
rms_norm.py           RMSNorm
gated.py              gated activations, SwiGLU among them
experts.py            the experts of a mixture, and the sums that its routers are balanced by
linear_attention.py   gated delta nets, and Mamba-2's scan
selective_scan.py     Mamba's scan, and RecurrentGemma's recurrence
segments.py           how these are computed within bounded memory
causal_conv1d.py      the short convolution before them
cross_entropy.py      what is known of chunk_linear_cross_entropy.py, which stands at the top and needs only PyTorch
"""
