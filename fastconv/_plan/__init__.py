"""Plans: a fused model lowered to a list of operator calls over static buffers, run by one call into C++.

flatten.py turns the model's traced forwards into one list of nodes with known shapes (network.py, steps.py); program.py
lays out buffers and binds the calls; inference.py, training.py and what they import lower the nodes. What a plan cannot
hold raises :class:`Refused` with the reason, and the caller runs the model eagerly.
"""

from .network import Refused

__all__ = ["Refused"]
