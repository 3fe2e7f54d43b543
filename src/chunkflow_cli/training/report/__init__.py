"""report.html: one page about a run that needs no network, no server and nothing but a browser."""
