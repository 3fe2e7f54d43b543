"""The command line: one file per command. `screens` prints the results for people."""
