"""The planners: `refine` (default), Skrull, HDP, FlexSP, an exact one, and baselines."""
