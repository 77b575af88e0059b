"""Training: stages as data, the one LightningModule that runs them, and everything around its updates."""
