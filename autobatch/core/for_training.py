"""What a plan does for the training loop, as methods of the plan. The work is done in ``training/``, which is loaded when it is called.

This is the one file of ``core`` that names a room above it: a plan is data, and its methods are how users reach that room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from autobatch.core.noise_scale import NoiseScale
    from autobatch.core.plan import BatchPlan


class ForTraining:
    """Methods of a ``BatchPlan`` for the training loop."""

    __slots__ = ()

    def with_noise_scale(self, noise: NoiseScale) -> BatchPlan:
        """Return this plan with notes on what ``noise``, from ``autobatch.noise_scale``, means for it.

        They say which constraint ends the use of larger batches first (memory, throughput or convergence), and at which size the time to
        a given loss is least. The batch size stays as it is: the noise scale is near zero at initialisation and grows.
        """
        from autobatch.core.convergence import with_noise_scale

        return with_noise_scale(cast("BatchPlan", self), noise)
