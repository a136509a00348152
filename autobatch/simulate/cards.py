"""The cards that are simulated: what the driver reports of each, and what of it no tensor can have."""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from autobatch.core.errors import InvalidRequest
from autobatch.core.units import GIB, KIB, MIB, parse_bytes

# A CUDA context with lazily loaded kernels: 287,047,680 bytes with torch 1.13 (pytorch pull request 86509), 426 MiB on an RTX 6000 Ada with
# torch 2.10 (unsloth-zoo issue 1053). Cards in between and beyond are assumed to lie on the nearer one.
_CONTEXT_BEFORE_AMPERE, _CONTEXT = 300 * MIB, 426 * MIB
# cuBLAS: ``:4096:2:16:8`` by default, 32 MiB from Hopper on; one for the forward and one for the backward thread (PyTorch CUDABlas.cpp).
_WORKSPACE, _WORKSPACE_HOPPER = 2 * (2 * 4096 + 8 * 16) * KIB, 2 * 32 * MIB
_AMPERE, _HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One kind of card.

    Attributes:
        name: what users call it.
        description: what nvidia-smi calls it.
        total: bytes the driver reports.
        capability: compute capability.
        source: where ``total`` is from, or that it is an assumption.
        aliases: other names.
    """

    name: str
    description: str
    total: int
    capability: tuple[int, int]
    source: str
    aliases: tuple[str, ...] = ()

    @property
    def context(self) -> int:
        """Bytes that the CUDA context takes, an assumption on all cards but the two it was measured on."""
        return _CONTEXT if self.capability >= _AMPERE else _CONTEXT_BEFORE_AMPERE

    @property
    def workspace(self) -> int:
        """Bytes of cuBLAS workspaces, taken from the caching allocator at the first product of matrices."""
        return _WORKSPACE_HOPPER if self.capability >= _HOPPER else _WORKSPACE


@functools.cache
def known_cards() -> tuple[Card, ...]:
    """Return every card of the table, in its order."""
    table = json.loads((Path(__file__).parent / "cards.json").read_text())
    return tuple(
        Card(
            name=row["name"],
            description=row["description"],
            total=int(row["total_gib"] * GIB),
            capability=(row["capability"][0], row["capability"][1]),
            source=row["source"],
            aliases=tuple(row["aliases"]),
        )
        for row in table["cards"]
    )


def find_card(name: str) -> Card:
    """Return the card called ``name``, or a card of so many bytes for an amount such as ``"24GiB"``.

    Raises:
        InvalidRequest: there is no such card; the closest names are offered.
    """
    plain = name.strip().lower().replace(" ", "-").replace("_", "-")
    by_name = {key: card for card in known_cards() for key in (card.name, *card.aliases)}
    if plain in by_name:
        return by_name[plain]
    if plain[:1].isdigit() and plain.endswith(("ib", "b", "g", "m")):
        # Ampere's kernels are what most cards of today have.
        total = parse_bytes(name)
        return Card(name=name, description=f"a card of {name}", total=total, capability=(8, 6), source="given")
    close = difflib.get_close_matches(plain, by_name, n=4, cutoff=0.4)
    offer = f"Did you mean {', '.join(close)}? " if close else ""
    raise InvalidRequest(
        f"There is no card {name!r} in the table. {offer}Any amount works too: --gpu 24GiB; autobatch estimate --help names all."
    )
