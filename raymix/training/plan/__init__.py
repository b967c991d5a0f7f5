"""What a run would do before it starts: preflight checks, tokens, epochs, memory."""
