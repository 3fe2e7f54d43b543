"""Start the ranks of a run, watch them, and say which one failed first."""
