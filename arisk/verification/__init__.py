"""The planned fine-tune really carried out, and the truth laid over the forecast."""
