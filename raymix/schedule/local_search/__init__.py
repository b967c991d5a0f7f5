"""Local search over schedules: cuts into micro-batches, assignment to ranks, improving moves."""
