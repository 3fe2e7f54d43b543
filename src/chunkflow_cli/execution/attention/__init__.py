"""The attention function that carries state between chunks, and the kernels behind it."""
