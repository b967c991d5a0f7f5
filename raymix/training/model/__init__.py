"""The model of a run: construction, loss, optimizer, parallelism and memory.

Read in this order: `hf_model` (from a configuration or checkpoint, with probes of what it can do),
`loss` (summed loss of packed rows), `parallel` (one process, DDP or FSDP2), `optim` (AdamW and
learning rate), `memory` (estimate without allocation).
"""
