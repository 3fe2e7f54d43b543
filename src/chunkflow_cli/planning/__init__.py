"""What every step of a run will do, and what it will cost: numpy and the standard library only."""
