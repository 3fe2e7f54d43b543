"""Plan what every step of a run does and what it costs, with numpy and the standard library only."""
