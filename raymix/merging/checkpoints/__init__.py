"""Reading and writing checkpoints and LoRA adapters tensor by tensor.

Read in this order: `checkpoint` (Hugging Face directories, memory-mapped), `adapter` (PEFT LoRA
adapters as factors), `models` (the base and the models of a merge file), `output` (a sharded
checkpoint written in any order, with a journal to resume from).
"""
