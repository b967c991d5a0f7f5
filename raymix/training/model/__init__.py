"""The model of a run: construction, loss, optimizer, parallelism and memory.

Read in this order: `facts` (descriptions, without torch), `hf_model` (from a configuration or
checkpoint), `traits` (tests of what it can do),
`lora` (adapters in it), `run_model` (the model of a run or of its checkpoint), `loss` (summed loss
of packed rows), `parallel` (one process, DDP or FSDP2), `optim` (groups), `learning_rate`,
`optimizer_class` (optimizers by name) with `muon`, `memory` (estimate without allocation).
"""
