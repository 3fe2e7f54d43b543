"""The command line: one command, one file; `screens` is what a person sees."""
