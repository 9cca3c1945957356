"""What does a job: builtin/, on stock PyTorch, and nnscaler/, on upstream nnScaler. table.py has both by name."""

TORCH, NNSCALER = ENGINE_NAMES = ("torch", "nnscaler")
