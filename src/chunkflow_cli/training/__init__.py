"""One training run: its folder, data, model, steps, checkpoints and report."""
