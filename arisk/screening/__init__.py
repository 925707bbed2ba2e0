"""Which fine-tuning rows push harm, and what dropping them changes."""
