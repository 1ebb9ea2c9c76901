"""Plans: a fused model lowered to a list of operator calls over static buffers, run by one call into C++.

graph.py flattens the model's traced forwards into one list of nodes with known shapes; program.py lays out buffers and
binds the calls; inference.py and training.py lower the nodes. What a plan cannot hold raises :class:`Refused` with the
reason, and the caller runs the model eagerly.
"""

from .graph import Refused

__all__ = ["Refused"]
