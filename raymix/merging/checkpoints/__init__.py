"""Reading and writing checkpoints and LoRA adapters tensor by tensor."""
