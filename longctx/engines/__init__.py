"""What does a job: builtin/, on stock PyTorch, and nnscaler/, on upstream nnScaler. table.py has both by name."""

TORCH, NNSCALER = "torch", "nnscaler"
ENGINE_NAMES = (TORCH, NNSCALER)
