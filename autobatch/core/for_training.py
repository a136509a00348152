"""What a plan does for the training loop, as methods of the plan. The work is done in ``training/``, which is loaded when it is called.

This is the one file of ``core`` that names a room above it: a plan is data, and its methods are how users reach that room.
"""

from __future__ import annotations


class ForTraining:
    """Methods of a ``BatchPlan`` for the training loop."""

    __slots__ = ()
