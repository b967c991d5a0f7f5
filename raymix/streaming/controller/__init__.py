"""The mixture controller: its actor, state, leases, windows of statistics, journal and client."""
