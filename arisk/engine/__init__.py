"""The run engine: freshness, run directory, reuse, status. It knows no stage by name."""
