"""Trackers: W&B, MLflow, trackio and TensorBoard, each in a process of its own that can do no harm to the run."""
