"""Whether warps that share memory wait for each other in between, whatever order they ran in."""

from __future__ import annotations

import numpy as np
from ptx_text import PtxError

__all__ = ["Races"]


class Races:
    """Vector clocks: of what each warp has done, how much each other one knows has been done.

    Barriers tell, and mbarriers. Bulk copies count as one more warp, which nothing but an
    mbarrier tells of. Threads of a warp are thought to be in step, and nobody to be at work
    between two runs.
    """

    def __init__(self, warps: int, size: int):
        self.copier = warps
        self.known = np.eye(warps + 1, dtype=np.int64)  # [who knows, of whom]
        # Of each byte.
        self._writer = np.full(size, warps)
        self._written = np.zeros(size, np.int64)
        self._read = np.zeros((warps, size), np.int64)
        self._fenced = np.ones(size, bool)

    def load(self, warps: np.ndarray, places: np.ndarray) -> None:
        """Warps `[n]` read bytes `[n, size]`."""
        self._look("reads", warps, places, "written", self.unknown_writes(warps, places))
        self._read[warps[:, None], places] = self.known[warps, warps][:, None]

    def remember_reads(self, warps: np.ndarray, places: np.ndarray, which: np.ndarray) -> None:
        """Warps `[n]` read bytes `[n, size]`, but only `which` of them are of use."""
        warps = np.broadcast_to(warps[:, None], places.shape)[which]
        self._read[warps, places[which]] = self.known[warps, warps]

    def store(self, warps: np.ndarray, places: np.ndarray, changed: np.ndarray) -> None:
        """Warps write bytes, some of which it changes: `[n, size]` each."""
        self._overwrite(warps, places, changed)
        self._writer[places] = warps[:, None]
        self._written[places] = self.known[warps, warps][:, None]
        self._fenced[places] = False

    def copy(self, warp: int, places: np.ndarray, fenced: bool = True) -> int:
        """A warp starts a copy to bytes; returns the copy's number.

        Args:
            warp: who starts it.
            places: the bytes.
            fenced: whether a fence must stand after what was stored there: of bulk copies.
        """
        one, places = np.array([warp]), places[None]
        self._overwrite(one, places, np.ones(places.shape, bool))
        if fenced and not self._fenced[places].all():
            raise PtxError("No fence.proxy.async stands between a store and a copy to its place.")
        self.known[self.copier, self.copier] += 1
        number = int(self.known[self.copier, self.copier])
        self._writer[places], self._written[places] = self.copier, number
        return number

    def fence(self, warps: np.ndarray) -> None:
        """Copies may follow what the warps have written."""
        self._fenced |= np.isin(self._writer, warps)

    def meet(self, warps: np.ndarray) -> None:
        """Each of the warps knows what any knows."""
        self.known[warps] = self.known[warps].max(axis=0)
        self.known[warps, warps] += 1

    def tell(self, warp: int, news: np.ndarray) -> np.ndarray:
        """What a warp knows besides what is known already, for others to learn."""
        news = np.maximum(news, self.known[warp])
        self.known[warp, warp] += 1
        return news

    def learn(self, warp: int, news: np.ndarray) -> None:
        """A warp is told."""
        self.known[warp] = np.maximum(self.known[warp], news)

    def unknown_writes(self, warps: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Which of bytes `[n, size]` have been written without the warps `[n]` knowing that."""
        return self._written[places] > self.known[warps[:, None], self._writer[places]]

    def _overwrite(self, warps: np.ndarray, places: np.ndarray, changed: np.ndarray) -> None:
        lost = changed & self.unknown_writes(warps, places)
        self._look("writes", warps, places, "written", lost)
        readers = self._read[:, places] > self.known[warps].T[: self.copier, :, None]
        self._look("writes", warps, places, "read", changed & readers.any(axis=0))

    def _look(
        self, what: str, warps: np.ndarray, places: np.ndarray, before: str, wrong: np.ndarray
    ) -> None:
        if wrong.any():
            n, byte = np.argwhere(wrong)[0]
            raise PtxError(
                f"Warp {warps[n]} {what} byte {places[n, byte]} of shared memory, which another "
                f"has {before}, or a copy: nothing has told it that this is over."
            )
