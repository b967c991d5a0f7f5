"""Cost models: seconds per piece of work, presets, fits to measurements, timing of a schedule."""
