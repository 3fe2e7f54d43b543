"""What a person sees of a command's result: one screen, one file."""
