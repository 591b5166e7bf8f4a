"""A key/value cache whose rows have lengths of their own: what lets sequences join and leave a batch between steps.

Column c of a row holds the key and value of its position c: no row is padded, whatever the others' lengths are. So
learned, rotary and ALiBi positions need nothing but the right numbers, and a row can be moved, cut or kept for later.

transformers' own were measured first (5.24; a 34M-parameter LLaMA in fp32 on two cores, 32 prompts of 32 to 64 tokens,
48 new tokens each; tokens/s of one or two single readings, which differ by a fifth on that machine;
`python -m megalith.bench.inference --batch_sizes 1 32` repeats it):

    generate, DynamicCache    504, 616    pads the rows for good, and none can join or leave
    generate, StaticCache     580         the same
    generate_batch            172         paged, continuous; 9 s and 9 GiB before its first token, no ALiBi
    this cache                617, 537

So this cache is about as fast as what cannot batch continuously, and faster than what can. With one prompt it reads 58
and 64 where DynamicCache reads 64 and 67, and generate_batch 10.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

BLOCK = 128  # columns that the cache grows by: a copy each 128 steps costs less than 1 % of reading it at each step


@dataclass
class _Plan:
    """What the layers do with the keys and values [B, heads, Q, head_dim] of the forward pass that comes next."""

    rows: slice
    """The B rows of the cache that are written."""
    stop: int = 0
    """Columns that attention sees: 0 to stop - 1."""
    start: int = 0
    """The first column that is written, where it is the same in all rows."""
    columns: torch.Tensor | None = None
    """[B]: the column of each row that is written instead, for Q = 1."""
    places: dict[int, torch.Tensor] = field(default_factory=dict)
    """By number of heads, where `columns` lie in a layer's memory [rows * heads * columns, head_dim]: one index [B *
    heads] for the layers of a pass."""
    sources: torch.Tensor | None = None
    """[B * Q]: rows come padded on the left, and this tells which token of the B * Q goes to column 0, 1, … of each."""
    offset: int = 0
    """Position of the first query in masks, which transformers takes to be one for all rows."""
    is_static: bool = False
    """Whether nothing may look at values: masks must not be left out where nothing is masked."""


class _Layer(CacheLayerMixin):
    """Keys and values [rows, heads, columns, head_dim] of one layer."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.plan = _Plan(slice(0, 0))
        self.shape = (0, 0)  # rows, columns

    @property
    def is_compileable(self) -> bool:
        return self.plan.is_static

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, columns = self.shape
        # Zeros, since a masked column still takes part in a product: whatever was in memory may be NaN.
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.plan
        _write(self.keys, key_states, plan)
        _write(self.values, value_states, plan)
        if plan.columns is None and plan.start == 0:
            return key_states, value_states  # padded as the mask is
        return self.keys[plan.rows, :, : plan.stop], self.values[plan.rows, :, : plan.stop]

    def get_mask_sizes(self, query_length: object) -> tuple[int, int]:
        return self.plan.stop, 0

    def get_seq_length(self) -> int:
        return self.plan.offset

    def get_max_length(self) -> int:
        return -1

    def resize(self, rows: int, columns: int) -> None:
        """Keep what fits of rows and columns."""
        old, self.shape = self.shape, (rows, columns)
        if not self.is_initialized:
            return
        if rows * columns == 0:
            self.keys = self.values = None
            self.is_initialized = False
            return
        kept = (slice(0, min(old[0], rows)), slice(None), slice(0, min(old[1], columns)))
        old_keys, old_values = self.keys, self.values
        self.lazy_initialization(old_keys, old_values)
        self.keys[kept].copy_(old_keys[kept])
        self.values[kept].copy_(old_values[kept])


def _write(stored: torch.Tensor, new: torch.Tensor, plan: _Plan) -> None:
    if plan.columns is not None:
        # scatter_ would turn all of a 16-bit cache into float32 and back, on a CPU; index_put_ makes more calls.
        heads, columns = stored.shape[1:3]
        if heads not in plan.places:
            first = torch.arange(len(plan.columns) * heads, device=new.device).view(-1, heads) * columns
            plan.places[heads] = (first + plan.columns[:, None]).flatten()
        stored.view(-1, stored.shape[3]).index_copy_(0, plan.places[heads], new.flatten(0, 2))
        return
    if plan.sources is not None:
        # Whole tokens are moved, as they lie in memory: a gather would go number by number.
        tokens = new.transpose(1, 2)
        new = tokens.flatten(0, 1).index_select(0, plan.sources).view_as(tokens).transpose(1, 2)
    stored[plan.rows, :, plan.start : plan.start + new.shape[2]] = new


class KVCache(Cache):
    """Rows 0 to len(lengths) - 1 are in use. Before a forward pass, one of `plan_prefill`, `plan_extend` and
    `plan_decode` says what it is; each returns the pass's attention mask and positions.

    Raises NotImplementedError for layers that are not plain attention, and once a row is longer than a model's sliding
    window.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        config = config.get_text_config(decoder=True)
        _check_supported(config)
        self.lengths: list[int] = []
        self.version = 0
        """Of the storage: changes whenever that is allocated anew."""
        self._rows = 0
        self._columns = 0
        self._window = getattr(config, "sliding_window", None) if _has_window(config) else None
        super().__init__(layers=[_Layer() for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    @property
    def allocated(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._rows, self._columns

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for `rows` rows of `columns` columns, rounded up to whole blocks."""
        columns = -(-columns // BLOCK) * BLOCK
        self._resize(max(rows, self._rows), max(columns, self._columns))

    def _resize(self, rows: int, columns: int) -> None:
        if (rows, columns) == (self._rows, self._columns):
            return
        self._rows, self._columns = rows, columns
        self.version += 1
        for layer in self.layers:  # one after the other, so that only one layer is there twice
            layer.resize(rows, columns)

    def _plan(self, plan: _Plan) -> None:
        if self._window is not None and plan.stop > self._window:
            raise NotImplementedError(
                f"sequences longer than the model's sliding window of {self._window} tokens are not supported"
            )
        for layer in self.layers:
            layer.plan = plan

    def plan_prefill(self, lengths: Sequence[int], device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor]:
        """New rows from their first token on, padded on the left to the longest. Returns mask (None: no padding) and
        positions [B, Q]."""
        first, longest = len(self.lengths), max(lengths)
        self.reserve(first + len(lengths), longest)
        self.lengths += lengths
        columns = torch.arange(longest, device=device)
        padding = longest - torch.tensor(lengths, device=device).unsqueeze(1)
        plan = _Plan(slice(first, first + len(lengths)), stop=longest)
        mask = None
        if min(lengths) < longest:
            behind = (columns + padding).clamp(max=longest - 1)  # what is behind a row's end is never seen
            plan.sources = (torch.arange(len(lengths), device=device).unsqueeze(1) * longest + behind).flatten()
            mask = columns >= padding
        self._plan(plan)
        return mask, (columns - padding).clamp(min=0)

    def plan_extend(self, count: int, device: torch.device) -> tuple[None, torch.Tensor]:
        """`count` more tokens of the cache's only row. Returns no mask, and positions [1, Q]."""
        if len(self.lengths) > 1:
            raise ValueError(f"{len(self.lengths)} rows: only a row on its own can be extended")
        if not self.lengths:
            return self.plan_prefill([count], device)
        start = self.lengths[0]
        self.reserve(1, start + count)
        self.lengths[0] += count
        self._plan(_Plan(slice(0, 1), stop=start + count, start=start, offset=start))
        return None, torch.arange(start, start + count, device=device).unsqueeze(0)

    def plan_decode(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor]:
        """One more token of every row. Returns mask [B, stop] (None: rows are equally long) and positions [B, 1]."""
        lengths = self.grow()
        rows, stop = slice(0, len(lengths)), max(self.lengths)
        positions = torch.tensor(lengths, device=device)
        if min(self.lengths) == stop:
            self._plan(_Plan(rows, stop=stop, start=stop - 1, offset=stop - 1))
            return None, positions.unsqueeze(1)
        self._plan(_Plan(rows, stop=stop, columns=positions, offset=stop - 1))
        return torch.arange(stop, device=device) <= positions.unsqueeze(1), positions.unsqueeze(1)

    def plan_static(self, columns: torch.Tensor) -> None:
        """One more token of every row that is allocated, written to `columns` [rows], with attention to all columns."""
        rows, stop = self.allocated
        self._plan(_Plan(slice(0, rows), stop=stop, columns=columns, offset=stop - 1, is_static=True))

    def grow(self) -> list[int]:
        """Make room for one more token of every row; returns their positions."""
        positions = self.lengths
        self.reserve(len(positions), max(positions) + 1)
        self.lengths = [length + 1 for length in positions]
        return positions

    def read(self, row: int) -> "KVRow":
        """The row's keys and values, as views."""
        length = self.lengths[row]
        keys = [layer.keys[row, :, :length] for layer in self.layers]
        return KVRow(keys, [layer.values[row, :, :length] for layer in self.layers])

    def append(self, row: "KVRow") -> None:
        """A copy of `row` as the last row."""
        index = len(self.lengths)
        self.reserve(index + 1, row.length)
        self.lengths.append(row.length)
        for layer, keys, values in zip(self.layers, row.keys, row.values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys.unsqueeze(0), values.unsqueeze(0))
            layer.keys[index, :, : row.length] = keys
            layer.values[index, :, : row.length] = values

    def drop(self, row: int) -> None:
        """Give up a row; the last one takes its place. Gives memory back when less than half of it is needed."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for layer in self.layers:
                layer.keys[row, :, :length] = layer.keys[last, :, :length]
                layer.values[row, :, :length] = layer.values[last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()
        rows, columns = len(self.lengths), max(self.lengths, default=0)
        columns = -(-columns // BLOCK) * BLOCK
        if 2 * rows * columns <= self._rows * self._columns:
            self._resize(rows, columns)


@dataclass(frozen=True)
class KVRow:
    """Keys and values [heads, length, head_dim] of one sequence, for each layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in itertools.chain(self.keys, self.values))

    def clone(self, length: int | None = None) -> "KVRow":
        """A copy of the first `length` positions, all by default."""
        return KVRow([t[:, :length].clone() for t in self.keys], [t[:, :length].clone() for t in self.values])

    def first(self, length: int) -> "KVRow":
        """A view of the first `length` positions."""
        return KVRow([t[:, :length] for t in self.keys], [t[:, :length] for t in self.values])


def _check_supported(config: PreTrainedConfig) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"{config.model_type} has layers of kind {', '.join(sorted(other))}: not supported")


def _has_window(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


def bytes_per_token(model: nn.Module) -> int:
    """Of one row's keys and values, over all layers."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize
