"""The parts of one training step: micro-batches, all-reduced metrics, gradient probes."""
