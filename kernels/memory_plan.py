"""How a memory lookup is laid out on a card: fixed rules by shape, each with its reason.

Nothing is tried out at run time, so that a call costs nothing to configure and runs the same way
every time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .card import Card, card_of, power_of_2


@dataclass(frozen=True)
class Config:
    """Tile and launch options of one kernel, and into how many parts its work is split."""

    block_b: int
    block_m: int
    block_c: int
    parts: int
    num_warps: int
    num_stages: int


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Plan:
    """One lookup: sizes, bytes of an element and card in, configurations out."""

    B: int
    N: int
    M: int
    C: int
    element_size: int
    card: Card

    @staticmethod
    def of(query: Tensor, memory: Tensor) -> Plan:
        (B, N, C), M = query.shape, memory.shape[1]
        return Plan(B, N, M, C, query.element_size(), card_of(query))

    def options(self, config: Config) -> dict[str, int | str]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_B": config.block_b,
            "BLOCK_M": config.block_m,
            "BLOCK_C": config.block_c,
            "PRECISION": self.card.float32_precision,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def steps_of(self, config: Config) -> int:
        """Steps of ``block_c`` columns that one of the parts makes."""
        return _ceil_div(_ceil_div(self.C, config.block_c), config.parts)

    # --- tiles ---

    @property
    def _block_b(self) -> int:
        # Matrix instructions take 16 rows at least; 64 feed a warpgroup's. 64 rows of 256 slots in
        # float32 are half of the registers of 8 warps; with more slots, or with float32 operands
        # that have to be split in three, that many rows would spill.
        largest = 32 if self.M > 256 or self.element_size == 4 else 64
        return min(max(power_of_2(self.B), 16), largest)

    @property
    def _block_c(self) -> int:
        # 128 bytes of each row and slot: a whole cache line.
        return min(max(power_of_2(self.C), 16), 128 // self.element_size)

    @property
    def _all_slots(self) -> int:
        return max(power_of_2(self.M), 16)

    @property
    def _steps(self) -> int:
        return _ceil_div(self.C, self._block_c)

    @property
    def _row_blocks(self) -> int:
        return _ceil_div(self.B, self._block_b) * self.N

    def _config(self, block_m: int, parts: int) -> Config:
        block_b, block_c = self._block_b, self._block_c
        # As many tiles in flight as shared memory holds beside the weights, 2 to 4.
        tile = (block_b + block_m) * block_c * self.element_size
        weights = block_b * block_m * self.element_size
        stages = min(max((self.card.shared_memory - weights) // tile, 2), 4)
        warps = 8 if block_b * block_m >= 8192 else 4
        return Config(block_b, block_m, block_c, parts, warps, stages)

    # --- kernels ---

    def one_pass(self) -> Config | None:
        """Where row blocks alone fill the card; None elsewhere."""
        if self._row_blocks < self.card.multiprocessors * 3 // 4:
            return None
        return self._config(self._all_slots, 1)

    def scores(self) -> Config:
        """Slots and width split so that the fewest bytes pass through the busiest multiprocessor.

        Wide slot tiles read the rows less often. Parts of the width spread the reading, but each
        is written, and read again by the kernel that adds them.
        """

        def cost(config: Config) -> int:
            programs = self._row_blocks * _ceil_div(self.M, config.block_m) * config.parts
            rounds = _ceil_div(programs, self.card.multiprocessors)
            columns = self.steps_of(config) * config.block_c
            reading = (config.block_b + config.block_m) * columns * self.element_size
            writing = config.block_b * config.block_m * 4
            adding = config.parts * config.block_b * self.M * 4
            return rounds * (reading + writing) + adding

        return min(
            (
                self._config(block_m, parts)
                for block_m in (32, 64, 128, 256)
                if block_m <= max(self._all_slots, 32)
                for parts in range(1, min(self._steps, 32) + 1)
            ),
            key=cost,
        )

    def combine(self) -> Config:
        """All slots, the width shared so that the card is filled."""
        shares = max(self.card.multiprocessors // self._row_blocks, 1)
        return self._config(self._all_slots, min(shares, self._steps))

    def slot_gradient(self) -> Config:
        """Square tiles: both operands are read equally often."""
        block_b = min(max(power_of_2(self.B), 16), 64)
        block_m, block_c = min(self._all_slots, 64), min(max(power_of_2(self.C), 16), 64)
        return Config(block_b, block_m, block_c, 1, 4, 3)

    def search(self) -> Config:
        """The slots shared, so that two programs are at work on every multiprocessor.

        The number of shares is a power of 2, for the kernel that merges them.
        """
        block_m = 128
        wanted = max(2 * self.card.multiprocessors // self._row_blocks, 1)
        parts = 1 << (wanted.bit_length() - 1)
        return self._config(block_m, min(parts, power_of_2(_ceil_div(self.M, block_m)), 64))
