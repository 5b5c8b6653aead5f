"""Keys and values of a batch whose rows have prefixes of different lengths, and take back what was not committed."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

_STEP = 256  # columns by which the buffers grow


class RowCache(Cache):
    """A key-value cache whose columns are logical positions: row b holds its positions 0 to n_b - 1 in its first n_b columns.

    A pass writes the entries of row b from column n_b on. Nothing is cropped: what the caller does not count as committed is
    overwritten by the next pass, and until then hidden by the mask. Layers with a sliding window keep all columns.

    Shapes: B rows, K key-value heads, Q tokens of a pass, E head width.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._first: Tensor | int = 0
        self._columns = 0

    def begin(self, first_B: Tensor, lengths: list[int], tokens: int) -> None:
        """Announce a pass: its ``tokens`` of row b go to the columns from ``first_B[b]`` on; ``lengths`` is that on the host."""
        self._first = lengths[0] if len(set(lengths)) == 1 else first_B
        self._columns = max(lengths) + tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, K, Q, E] and return all columns of the pass."""
        if layer_idx == len(self._keys):
            self._keys.append(_room(key_states[:, :, :0], self._columns))
            self._values.append(_room(value_states[:, :, :0], self._columns))
        for stores, states in ((self._keys, key_states), (self._values, value_states)):
            if stores[layer_idx].shape[2] < self._columns:
                stores[layer_idx] = _room(stores[layer_idx], self._columns)
            self._write(stores[layer_idx], states)
        return self._keys[layer_idx][:, :, : self._columns], self._values[layer_idx][:, :, : self._columns]

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (indices) of the batch."""
        self._keys = [keys.index_select(0, rows.to(keys.device)) for keys in self._keys]
        self._values = [values.index_select(0, rows.to(values.device)) for values in self._values]

    def _write(self, store: Tensor, states: Tensor) -> None:
        tokens = states.shape[2]
        if isinstance(self._first, int):
            store[:, :, self._first : self._first + tokens] = states
            return
        first = self._first.to(states.device)
        columns = first[:, None] + torch.arange(tokens, device=states.device)
        store.scatter_(2, columns[:, None, :, None].expand_as(states), states)


def _room(held: Tensor, columns: int) -> Tensor:
    """``held`` with zeros behind it, for ``columns`` and some more. Zeros: a hidden value that is no number would still count."""
    rows, heads, old, width = held.shape
    store = held.new_zeros(rows, heads, -(-columns // _STEP) * _STEP, width)
    store[:, :, :old] = held
    return store
