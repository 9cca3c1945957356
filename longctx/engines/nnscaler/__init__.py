"""The same job on upstream nnScaler 0.8: its tracer, planner, generated code and training loop; our model and data.

options.py, checkpoints.py and engine.py can be imported where nnScaler is not installed; engine.py imports training.py,
and with it nnScaler, when the engine is used.
"""
