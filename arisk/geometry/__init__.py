"""Pure functions from tensors to tensors: Fisher geometry, dynamics, forecasts. No I/O, no config."""
