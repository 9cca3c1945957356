"""Raw text -> tokens: what bookcorpus.py packs into rows. Knows nothing of models or of training."""
