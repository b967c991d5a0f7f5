"""`raymix tune`: proxy runs of many mixtures, a law of their losses, its optimum, verified."""
