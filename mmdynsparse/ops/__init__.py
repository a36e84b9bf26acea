"""Pure tensor functions: selection and the layout of windows."""

from .cells import (
    CellRows,
    cell_grid,
    cell_mask,
    cell_means,
    cell_positions,
    cell_rows,
    cell_table,
    put_tiles,
    row_tiles,
    sparse_table,
    table_map,
    take_tiles,
    tile_rows,
)
from .linear import linear
from .regions import REGIONS, region
from .resize import enlarge_cells, enlarge_rows
from .roi_align import roi_align
from .rows import is_exporting, plain_float32, plain_inference, put_rows
from .select import (
    CLAMPED,
    SELECTORS,
    Decision,
    keep_all,
    kept_and_dropped,
    location_mask,
    location_scores,
    resize_scores,
    sample_decision,
    select_decision,
)
from .single_path import (
    MIXER_LETTERS,
    MIXERS,
    BlockShape,
    Bottleneck,
    Kernels,
    bottleneck,
    chain,
    chosen_mixer,
    cost_gates,
    ffn_macs,
    gated_cost,
    mix_heads,
    mixer_macs,
    mixer_weights,
    open_gates,
    sample_gates,
    throttle,
)
from .tokens import (
    TokenSubset,
    attention_received,
    policy_softmax,
    put_tokens,
    take_tokens,
    token_subset,
)
from .two_paths import BREAK_EVEN, DENSE, EXECUTIONS, Plan, form_of, plan, two_paths
from .windows import (
    WindowRows,
    kept_window_rows,
    relative_position_index,
    shift_mask,
    window_layout,
    window_partition,
    window_unpartition,
)
from .winograd import conv2d
