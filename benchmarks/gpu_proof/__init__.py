"""The proof on a GPU: `make gpu-proof` runs it, docs/gpu.md explains it.

cases.py      what is measured: sections and their rows, as plain data
__main__.py   runs the sections, each in a process of its own with a limit, and keeps every row as it comes
worker.py     one such process
parity.py steps.py memory.py seconds.py speed.py    the sections
models.py training.py    random models of real shapes; a run of `train`, one step at a time
tables.py     the table at the end, and that of docs/gpu.md
bundle.py     the wheels for a machine without a network
"""
