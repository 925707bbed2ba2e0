"""Validity benchmark: forecasts made before training against many real fine-tunes of the embedded model."""
