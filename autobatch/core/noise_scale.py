"""The simple noise scale φ = tr Σ / |G|² (McCandlish et al. 2018, arXiv 1812.06162) from the norms of micro-gradients.

G is the mean gradient, Σ the covariance of the gradient of one row. A *window* is k micro-gradients of m rows each, on different data. With
q the mean of their squared norms and p the squared norm of their mean, |G|² = (k·p − q) / (k − 1) and tr Σ = m·k·(q − p) / (k − 1) without
bias. The ratio within a window is biased, so both are averaged over windows apart and divided once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from autobatch.core.errors import InvalidRequest

# Two standard errors on either side: 95 % of a normal distribution.
_ERRORS = 2.0
# Micro-gradients that are this alike were taken on the same rows.
_ALIKE = 1e-5
# Fewer micro-gradients leave |G|² several times as uncertain.
FEW = 8
_ORDER_OF_MAGNITUDE = (
    "an order of magnitude, no more: where both were measured, the simple noise scale was 0.05 to 8 times the critical batch size "
    "(McCandlish et al. 2018, arXiv 1812.06162, table 1)"
)
_FLOOR = (
    "for these weights and this learning rate only: near zero at initialisation, it grows ten times and more in training, so it is a floor "
    "for now and no cap for later (Merrill et al. 2025, arXiv 2505.23971)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseScale:
    """The batch size, in rows, at which the noise of a gradient is as large as the gradient itself: φ = tr Σ / |G|².

    A row counts along dimension 0 of a batch: a sequence, not a token. Gradients are in the loss's units.

    Attributes:
        value: φ in rows; ``None`` where |G|² is within two standard errors of zero.
        lower_bound: rows that φ is at least, at two standard errors.
        low, high: the jackknife interval of two standard errors over the windows; ``None`` with ``value``.
        windows: windows that were used.
        micro_batches: micro-gradients in a window, k, over accumulation and ranks.
        rows: rows in a micro-batch, m.
        squared_gradient: estimate of |G|².
        squared_gradient_error: its standard error over the windows.
        variance: estimate of tr Σ.
        skipped: windows left out because a gradient was not finite.
        parameters: ``"all"``, or ``"layernorm"`` for those of the normalisation layers alone.
        notes: what to know before using the figure.
    """

    value: float | None
    lower_bound: float
    low: float | None = None
    high: float | None = None
    windows: int
    micro_batches: int
    rows: int
    squared_gradient: float
    squared_gradient_error: float
    variance: float
    skipped: int = 0
    parameters: str = "all"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        over = f"{self.windows} windows of {self.micro_batches} × {self.rows} rows"
        if self.value is None:
            return f"noise scale above {self.lower_bound:.3g} rows, by {over}"
        return f"noise scale {self.value:.3g} rows ({self.low:.3g} – {self.high:.3g}), by {over}"


def estimate_noise_scale(
    squares: Sequence[tuple[float, float]], *, micro_batches: int, rows: int, parameters: str = "all", notes: Sequence[str] = ()
) -> NoiseScale:
    """Return the noise scale from ``(q, p)`` of each window: the mean squared norm of its micro-gradients, the squared norm of their mean.

    A window in which either is not finite is left out and counted.

    Raises:
        InvalidRequest: fewer than two micro-gradients or two finite windows, or micro-gradients that are all alike.
    """
    if micro_batches < 2:
        raise InvalidRequest(
            f"A window has {micro_batches} micro-gradient; noise shows only between two or more, of different rows. "
            f"Accumulate over {FEW} micro-batches, or train on more ranks."
        )
    finite = [(q, p) for q, p in squares if math.isfinite(q) and math.isfinite(p)]
    skipped = len(squares) - len(finite)
    if len(finite) < 2:
        raise InvalidRequest(
            f"{len(finite)} of {len(squares)} windows had finite gradients, and two are the least from which an interval can be had. "
            "Give more batches; if gradients overflow, look at the loss, its scale and the learning rate."
        )
    _refuse_alike(finite)
    gradients = [(micro_batches * p - q) / (micro_batches - 1) for q, p in finite]
    variances = [rows * micro_batches * (q - p) / (micro_batches - 1) for q, p in finite]
    gradient, variance = statistics.fmean(gradients), statistics.fmean(variances)
    error = statistics.stdev(gradients) / math.sqrt(len(finite))
    told = (*_notes(micro_batches, skipped, parameters), *notes)
    bound = variance / max(gradient + _ERRORS * error, math.ulp(0.0))
    value = low = high = None
    if gradient > _ERRORS * error:
        value = variance / gradient
        low, high = _jackknife(variances, gradients)
    else:
        told = (
            f"|G|² is {gradient:.3g} ± {error:.2g}, not told apart from zero: give more windows, or micro-batches of more rows",
            *told,
        )
    return NoiseScale(
        value=value,
        lower_bound=bound,
        low=low,
        high=high,
        windows=len(finite),
        micro_batches=micro_batches,
        rows=rows,
        squared_gradient=gradient,
        squared_gradient_error=error,
        variance=variance,
        skipped=skipped,
        parameters=parameters,
        notes=told,
    )


def _refuse_alike(windows: Sequence[tuple[float, float]]) -> None:
    if all(q - p <= _ALIKE * q for q, p in windows):
        raise InvalidRequest(
            f"The micro-gradients of each of {len(windows)} windows are all alike (or zero): there is no noise between them, as when one "
            "batch is repeated. Give a loader that yields different rows each time."
        )


def _jackknife(variances: Sequence[float], gradients: Sequence[float]) -> tuple[float, float]:
    """Return two standard errors below and above the ratio of the means, from leaving out one window after the other.

    In logarithms, because a ratio is off by factors. No sum without one window can reach zero where the mean is above two standard errors.
    """
    count, variance, gradient = len(gradients), math.fsum(variances), math.fsum(gradients)
    logs = [math.log((variance - v) / (gradient - g)) for v, g in zip(variances, gradients, strict=True)]
    error = math.sqrt((count - 1) * statistics.pvariance(logs))
    ratio = variance / gradient
    return ratio * math.exp(-_ERRORS * error), ratio * math.exp(_ERRORS * error)


def _notes(micro_batches: int, skipped: int, parameters: str) -> list[str]:
    notes = [_ORDER_OF_MAGNITUDE, _FLOOR]
    if parameters == "layernorm":
        notes.append(
            "of the normalisation layers' parameters alone: in transformers it follows that of all parameters up to a factor "
            "(Gray et al. 2024, arXiv 2411.00999)"
        )
    if micro_batches < FEW:
        notes.append(f"{micro_batches} micro-gradients a window are few: {FEW} or more tell |G|² several times as precisely")
    if skipped:
        notes.append(f"{skipped} of the windows had a gradient that was not finite and were left out")
    return notes
