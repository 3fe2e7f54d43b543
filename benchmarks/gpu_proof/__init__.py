"""The proof on a GPU: `make gpu-proof` runs it, docs/gpu.md explains it.

cases.py      what is measured: sections and their rows, as plain data
__main__.py   runs the sections, each in a process of its own with a limit, and keeps every row as it comes
worker.py     one such process
rows.py       what a measurement returns, and what becomes of one that fails
prepare.py parity.py steps.py memory.py calibration.py seconds.py speed.py profile.py    the sections
models.py training.py    random models of real shapes; a run of `train`, one step at a time
tables.py     the table at the end, and that of docs/gpu.md
"""
