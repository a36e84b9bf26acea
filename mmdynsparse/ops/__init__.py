"""Pure tensor functions: selection and the layout of windows."""

from .cells import (
    CellRows,
    cell_grid,
    cell_mask,
    cell_means,
    cell_positions,
    cell_rows,
    cell_table,
    map_tiles,
    put_tiles,
    sparse_table,
    table_map,
    take_tiles,
    tile_rows,
)
from .linear import linear
from .regions import REGIONS, region
from .resize import enlarge_rows
from .rows import put_rows
from .select import (
    FIXED_BUDGET,
    SELECTORS,
    Decision,
    keep_all,
    num_kept,
    resize_scores,
    sample_decision,
    select_decision,
    spread_decision,
    with_positions,
)
from .tokens import TokenSubset, policy_softmax, put_tokens, take_tokens, token_subset
from .two_paths import gathering_pays, two_paths
from .windows import (
    WindowLayout,
    WindowRows,
    kept_window_rows,
    relative_position_index,
    shift_mask,
    window_layout,
    window_rows,
)

__all__ = [
    'FIXED_BUDGET',
    'REGIONS',
    'SELECTORS',
    'CellRows',
    'Decision',
    'TokenSubset',
    'WindowLayout',
    'WindowRows',
    'cell_grid',
    'cell_mask',
    'cell_means',
    'cell_positions',
    'cell_rows',
    'cell_table',
    'enlarge_rows',
    'gathering_pays',
    'keep_all',
    'kept_window_rows',
    'linear',
    'map_tiles',
    'num_kept',
    'policy_softmax',
    'put_rows',
    'put_tiles',
    'put_tokens',
    'region',
    'relative_position_index',
    'resize_scores',
    'sample_decision',
    'select_decision',
    'shift_mask',
    'sparse_table',
    'spread_decision',
    'table_map',
    'take_tiles',
    'take_tokens',
    'tile_rows',
    'token_subset',
    'two_paths',
    'window_layout',
    'window_rows',
    'with_positions',
]
