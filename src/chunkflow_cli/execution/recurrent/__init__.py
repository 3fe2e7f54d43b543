"""Recurrent layers in chunks: their state goes from chunk to chunk through the state store, and so does its gradient.

A recurrent layer lets tokens meet in two functions, a short convolution and a scan. transformers writes each as a
function of the modeling file, under the same names in all of them, and calls a kernel behind that name where one is
installed. As with attention, only these functions are exchanged. The exchanged ones do what they did before unless a
chunk is running. Then they keep its segments apart, and let the piece of a long sequence begin with the state that the
chunk before has left.
"""

from chunkflow_cli.execution.recurrent.layers import comes_after_attention, prepare_recurrent_layers
from chunkflow_cli.execution.recurrent.running import RunningChunk

__all__ = ["RunningChunk", "comes_after_attention", "prepare_recurrent_layers"]
