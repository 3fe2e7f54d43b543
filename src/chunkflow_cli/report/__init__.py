"""What a person sees: a module a screen, and `console` for all of them. This one imports no torch; `training` does."""

from chunkflow_cli.report.console import human_bytes, human_seconds, stderr_console, stdout_console, working

__all__ = ["human_bytes", "human_seconds", "stderr_console", "stdout_console", "working"]
