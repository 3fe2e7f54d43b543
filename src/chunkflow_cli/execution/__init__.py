"""Running a schedule: batches, attention with state, loss, and the runner that goes through the operations."""
