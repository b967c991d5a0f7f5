"""`MixtureLoader` in the training frameworks that people use, one module each.

No other part of raymix imports these modules; each imports its framework, which is an optional
dependency (`pip install 'raymix[huggingface]'`, `raymix[lightning]`).
"""
