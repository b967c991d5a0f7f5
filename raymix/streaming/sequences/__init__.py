"""Which rank takes which sequence: plans made ahead of the workers, by an actor."""
