"""`python -m chunkflow_cli`: the command line, for launchers that start a module."""

from chunkflow_cli.cli.app import main

if __name__ == "__main__":
    main()
