"""Good configurations per kernel, architecture, kind of product and class of shapes, so that no first call tunes.

Architectures: 80 (A100), 90 (H100, H200), 100 (B200). A device takes the row of the largest architecture that is not
above its own. 86 stands for 8.6, 8.9 and 12.x, whose programs have 99 KB of shared memory: they take the row of 80 or
a smaller one that fits, which nobody has looked at further.
"""

from __future__ import annotations

from relprop.kernels.launch import Configuration

ARCHITECTURES = (80, 86, 90, 100)
# Shared memory that one program may have, in bytes.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def tabled_architecture(architecture: int) -> int:
    """The row of the table that a compute capability takes."""
    if architecture in (86, 87, 89) or architecture >= 110:
        return 86
    return max(a for a in (80, 90, 100) if a <= max(architecture, 80))


def configuration(kernel: str, architecture: int, kind: str = "", shape_class: str = "") -> Configuration:
    """The tabled configuration.

    Args:
        kernel: name of the table, shared by kernels that do the same work.
        architecture: compute capability, as 90 for 9.0.
        kind: of products: "half" (16-bit operands), "fp16" (attention with shares in tf32), "medium" (linear layers
            alone), "tf32", "tf32x3" or "ieee"; empty for kernels without any.
        shape_class: the kernel's own.
    """
    rows = TABLE[kernel, kind, shape_class]
    at = tabled_architecture(architecture)
    # A row that is not there is that of the architecture before it; 8.6 stands alone beside 8.0.
    return rows.get(at) or (rows.get(90) if at == 100 else None) or rows[80]


# BLOCK_M, then the other side of the output's tile, then the contraction.
def _share(m: int, n: int, k: int, warps: int, stages: int) -> Configuration:
    return Configuration({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, warps, stages)


def _back(m: int, k: int, n: int, warps: int, stages: int) -> Configuration:
    return Configuration({"BLOCK_M": m, "BLOCK_K": k, "BLOCK_N": n, "GROUP": 8}, warps, stages)


def _tiles(queries: int, keys: int, warps: int, stages: int) -> Configuration:
    return Configuration({"BLOCK_Q": queries, "BLOCK_K": keys}, warps, stages)


Rows = dict[int, Configuration]

TABLE: dict[tuple[str, str, str], Rows] = {
    ("linear_share_out", "half", "wide"): {
        80: _share(128, 64, 64, 8, 3),
        86: _share(64, 64, 64, 4, 3),
        90: _share(128, 128, 64, 8, 4),
    },
    ("linear_share_out", "half", "many"): {80: _share(64, 64, 64, 4, 3), 90: _share(128, 64, 64, 8, 3)},
    ("linear_share_out", "half", "few"): {80: _share(16, 32, 128, 4, 4)},
    ("linear_share_out", "medium", "wide"): {80: _share(64, 64, 32, 4, 3), 90: _share(128, 64, 64, 8, 3)},
    ("linear_share_out", "medium", "many"): {
        80: _share(64, 64, 32, 8, 3),
        90: _share(128, 64, 64, 8, 3),
        100: _share(128, 64, 32, 8, 3),
    },
    ("linear_share_out", "medium", "few"): {80: _share(16, 32, 64, 4, 4)},
    ("linear_share_out", "tf32", "wide"): {80: _share(64, 64, 32, 8, 3), 90: _share(128, 64, 32, 8, 3)},
    ("linear_share_out", "tf32", "many"): {80: _share(64, 64, 32, 8, 3), 90: _share(128, 64, 32, 8, 3)},
    ("linear_share_out", "tf32", "few"): {80: _share(16, 32, 64, 4, 4)},
    ("linear_share_out", "tf32x3", "wide"): {80: _share(64, 32, 32, 4, 2), 90: _share(64, 64, 32, 8, 3)},
    ("linear_share_out", "tf32x3", "many"): {
        80: _share(64, 32, 32, 8, 2),
        90: _share(64, 64, 32, 8, 3),
        100: _share(64, 64, 32, 4, 3),
    },
    ("linear_share_out", "tf32x3", "few"): {80: _share(16, 32, 64, 4, 4)},
    ("linear_share_out", "ieee", "wide"): {80: _share(64, 64, 16, 8, 2)},
    ("linear_share_out", "ieee", "many"): {80: _share(64, 32, 16, 8, 2)},
    ("linear_share_out", "ieee", "few"): {80: _share(16, 32, 32, 4, 2), 90: _share(16, 32, 16, 4, 2)},
    # One: relevance or a gradient. Fused: both.
    ("linear_back", "half", "one_many"): {
        80: _back(128, 64, 32, 4, 3),
        86: _back(64, 64, 32, 4, 3),
        90: _back(128, 128, 64, 8, 3),
    },
    ("linear_back", "half", "fused_many"): {80: _back(64, 64, 32, 4, 3), 90: _back(128, 64, 64, 8, 2)},
    ("linear_back", "half", "one_few"): {80: _back(16, 32, 64, 4, 4)},
    ("linear_back", "half", "fused_few"): {80: _back(16, 32, 64, 4, 3)},
    ("linear_back", "medium", "one_many"): {80: _back(64, 64, 32, 4, 3), 90: _back(128, 64, 64, 8, 2)},
    ("linear_back", "medium", "fused_many"): {80: _back(64, 64, 32, 4, 2), 90: _back(128, 64, 64, 8, 2)},
    ("linear_back", "medium", "one_few"): {80: _back(16, 32, 64, 4, 3)},
    ("linear_back", "medium", "fused_few"): {80: _back(16, 32, 64, 4, 3)},
    ("linear_back", "tf32", "one_many"): {80: _back(64, 64, 32, 4, 3)},
    ("linear_back", "tf32", "fused_many"): {80: _back(64, 64, 32, 4, 2)},
    ("linear_back", "tf32", "one_few"): {80: _back(16, 32, 64, 4, 3)},
    ("linear_back", "tf32", "fused_few"): {80: _back(16, 32, 64, 4, 2)},
    ("linear_back", "tf32x3", "one_many"): {80: _back(64, 32, 32, 4, 2), 90: _back(64, 64, 32, 8, 3)},
    ("linear_back", "tf32x3", "fused_many"): {80: _back(64, 32, 16, 4, 2), 90: _back(64, 32, 32, 4, 2)},
    ("linear_back", "tf32x3", "one_few"): {80: _back(16, 32, 64, 4, 3)},
    ("linear_back", "tf32x3", "fused_few"): {80: _back(16, 32, 32, 4, 2)},
    ("linear_back", "ieee", "one_many"): {80: _back(64, 64, 16, 8, 2)},
    ("linear_back", "ieee", "fused_many"): {80: _back(64, 32, 16, 8, 2)},
    ("linear_back", "ieee", "one_few"): {80: _back(16, 32, 32, 4, 2)},
    ("linear_back", "ieee", "fused_few"): {80: _back(16, 32, 32, 4, 2)},
    # Outputs that are no whole number of tiles, such as 1,000 classes: masks take registers.
    ("linear_back", "half", "ragged"): {
        80: _back(64, 64, 32, 8, 2),
        90: _back(128, 64, 32, 8, 2),
        100: _back(64, 64, 32, 8, 2),
    },
    ("linear_back", "medium", "ragged"): {80: _back(64, 64, 32, 8, 2)},
    ("linear_back", "tf32", "ragged"): {80: _back(64, 32, 32, 4, 2), 90: _back(64, 64, 32, 8, 2)},
    ("linear_back", "tf32x3", "ragged"): {80: _back(64, 32, 16, 4, 2)},
    ("linear_back", "ieee", "ragged"): {80: _back(64, 32, 16, 8, 2)},
    ("elementwise", "", ""): {80: Configuration({"BLOCK": 1024}, 4, 2)},
    ("add_normalised", "", ""): {80: Configuration({"BLOCK": 1024}, 4, 2)},
    ("scalars", "", ""): {80: Configuration({}, 4, 1)},
    ("rows", "", "small"): {80: Configuration({"BLOCK": 1024}, 4, 2)},
    ("rows", "", "large"): {80: Configuration({"BLOCK": 4096}, 8, 2)},
    # A norm's row lies in registers as a whole.
    ("norm", "", "small"): {80: Configuration({}, 4, 1)},
    ("norm", "", "medium"): {80: Configuration({}, 8, 1)},
    ("norm", "", "large"): {80: Configuration({}, 16, 1)},
    # Sides of attention, by the larger head size: tiles of queries and of keys.
    ("attention_statistics", "half", "d64"): {
        80: _tiles(64, 64, 8, 2),
        90: _tiles(64, 64, 4, 2),
        100: _tiles(64, 64, 4, 2),
    },
    ("attention_statistics", "half", "d128"): {
        80: _tiles(64, 64, 8, 2),
        90: _tiles(64, 64, 8, 2),
        100: _tiles(64, 64, 8, 2),
    },
    ("attention_statistics", "half", "d256"): {
        80: _tiles(64, 32, 8, 2),
        90: _tiles(64, 64, 8, 2),
        100: _tiles(64, 64, 8, 2),
    },
    ("attention_queries", "half", "d64"): {
        80: _tiles(32, 32, 4, 2),
        90: _tiles(64, 64, 8, 3),
        100: _tiles(64, 64, 8, 2),
    },
    ("attention_queries", "half", "d128"): {
        80: _tiles(64, 32, 8, 2),
        90: _tiles(64, 16, 8, 2),
        100: _tiles(64, 64, 8, 2),
    },
    ("attention_queries", "half", "d256"): {
        80: _tiles(32, 32, 8, 2),
        90: _tiles(64, 16, 8, 2),
        100: _tiles(64, 32, 8, 2),
    },
    ("attention_queries_signed", "half", "d64"): {
        80: _tiles(32, 32, 4, 2),
        90: _tiles(64, 32, 8, 2),
        100: _tiles(64, 64, 8, 3),
    },
    ("attention_queries_signed", "half", "d128"): {
        80: _tiles(32, 32, 4, 2),
        90: _tiles(64, 16, 8, 2),
        100: _tiles(64, 64, 8, 2),
    },
    ("attention_queries_signed", "half", "d256"): {
        80: _tiles(16, 32, 8, 1),
        90: _tiles(16, 16, 8, 1),
    },
    ("attention_keys_values", "half", "d64"): {
        80: _tiles(32, 32, 8, 2),
        90: _tiles(32, 64, 8, 2),
        100: _tiles(64, 64, 8, 2),
    },
    ("attention_keys", "half", "d64"): {80: _tiles(32, 32, 8, 2), 90: _tiles(32, 64, 8, 2), 100: _tiles(32, 64, 8, 2)},
    ("attention_keys", "half", "d128"): {80: _tiles(32, 32, 8, 1), 90: _tiles(16, 64, 8, 2), 100: _tiles(64, 64, 8, 2)},
    ("attention_keys", "half", "d256"): {
        80: _tiles(32, 64, 8, 2),
        86: _tiles(16, 32, 8, 2),
        90: _tiles(16, 64, 8, 2),
        100: _tiles(32, 64, 8, 2),
    },
    ("attention_keys_signed", "half", "d64"): {
        80: _tiles(32, 32, 4, 2),
        90: _tiles(16, 64, 8, 2),
        100: _tiles(64, 64, 8, 3),
    },
    ("attention_keys_signed", "half", "d128"): {
        80: _tiles(32, 32, 8, 1),
        90: _tiles(16, 64, 8, 2),
        100: _tiles(32, 64, 8, 2),
    },
    ("attention_keys_signed", "half", "d256"): {
        80: _tiles(16, 16, 8, 1),
        90: _tiles(32, 16, 8, 1),
        100: _tiles(16, 32, 8, 1),
    },
    ("attention_values", "half", "d64"): {
        80: _tiles(64, 32, 4, 2),
        90: _tiles(64, 64, 4, 2),
        100: _tiles(64, 64, 4, 2),
    },
    ("attention_values", "half", "d128"): {
        80: _tiles(64, 64, 8, 2),
        86: _tiles(64, 32, 8, 2),
        90: _tiles(64, 64, 8, 2),
        100: _tiles(64, 64, 8, 2),
    },
    ("attention_values", "half", "d256"): {
        80: _tiles(32, 32, 8, 1),
        90: _tiles(16, 64, 8, 2),
        100: _tiles(64, 64, 8, 2),
    },
}

# With float32 operands tiles are small: accumulators are as large, and in three parts each number is split into two.
_FLOAT32_TILES = {
    "tf32": {
        "queries": {64: _tiles(32, 32, 8, 1), 128: _tiles(16, 32, 8, 1), 256: _tiles(32, 16, 8, 1)},
        "queries_signed": {64: _tiles(32, 32, 8, 1), 128: _tiles(32, 16, 8, 1), 256: _tiles(32, 32, 8, 1)},
        "keys_values": {64: _tiles(16, 32, 8, 1)},
        "keys": {64: _tiles(16, 16, 8, 1), 128: _tiles(16, 16, 8, 1), 256: _tiles(32, 32, 8, 1)},
        "keys_signed": {64: _tiles(32, 16, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(32, 32, 8, 1)},
        "values": {64: _tiles(32, 32, 8, 1), 128: _tiles(16, 32, 8, 1), 256: _tiles(32, 32, 8, 1)},
    },
    "tf32x3": {
        "queries": {64: _tiles(32, 32, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(32, 16, 8, 1)},
        "queries_signed": {64: _tiles(32, 16, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(32, 16, 8, 1)},
        "keys_values": {64: _tiles(16, 16, 4, 1)},
        "keys": {64: _tiles(16, 32, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(32, 32, 8, 1)},
        "keys_signed": {64: _tiles(16, 32, 8, 1), 128: _tiles(16, 32, 8, 1), 256: _tiles(32, 16, 8, 1)},
        "values": {64: _tiles(32, 32, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(16, 32, 8, 1)},
    },
    "ieee": {
        "queries": {64: _tiles(32, 32, 8, 1), 128: _tiles(32, 32, 8, 2), 256: _tiles(32, 32, 8, 1)},
        "queries_signed": {64: _tiles(32, 32, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(32, 16, 8, 1)},
        "keys_values": {64: _tiles(16, 16, 8, 1)},
        "keys": {64: _tiles(16, 16, 8, 1), 128: _tiles(32, 32, 8, 2), 256: _tiles(32, 32, 8, 1)},
        "keys_signed": {64: _tiles(16, 16, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(16, 32, 8, 1)},
        "values": {64: _tiles(32, 32, 8, 1), 128: _tiles(16, 32, 8, 1), 256: _tiles(32, 16, 8, 1)},
    },
}
# The residual add's epilogue keeps to the tiles of the way back, but where it needs more registers beside them.
for _kind, _class in [key[1:] for key in TABLE if key[0] == "linear_back"]:
    TABLE["linear_back_add", _kind, _class] = TABLE["linear_back", _kind, _class]
TABLE["linear_back_add", "half", "one_many"] = TABLE["linear_back", "half", "fused_many"]
TABLE["linear_back_add", "tf32", "fused_many"] = {80: _back(64, 64, 32, 8, 2)}
TABLE["linear_back_add", "medium", "fused_many"] = {80: _back(64, 64, 32, 8, 2), 90: _back(64, 64, 64, 8, 2)}
for _kind, _sides in _FLOAT32_TILES.items():
    for _side, _sizes in _sides.items():
        for _size, _chosen in _sizes.items():
            TABLE[f"attention_{_side}", _kind, f"d{_size}"] = {80: _chosen}
for _size in (64, 128, 256):
    _large = _tiles(64, 32, 8, 1)
    TABLE["attention_statistics", "tf32", f"d{_size}"] = {80: _tiles(32, 32, 8, 1), 90: _large}
    TABLE["attention_statistics", "tf32x3", f"d{_size}"] = {80: _tiles(64, 32, 8, 2), 90: _large}
    TABLE["attention_statistics", "ieee", f"d{_size}"] = {80: _large, 100: _tiles(64, 32, 8, 2)}
TABLE["attention_keys_signed", "tf32", "d128"] |= {86: _tiles(16, 32, 8, 1)}

# float16 operands with shares in tf32: as tf32, but where 64 rows, which the large instructions take, fit.
_FLOAT16_LARGE: dict[tuple[str, int], Rows] = {
    ("queries", 64): {90: _tiles(64, 32, 8, 1), 100: _tiles(64, 32, 4, 1)},
    ("queries", 128): {100: _tiles(64, 32, 8, 1)},
    ("queries_signed", 64): {90: _tiles(64, 16, 8, 1)},
    ("queries_signed", 128): {100: _tiles(64, 16, 8, 1)},
    ("keys_values", 64): {90: _tiles(16, 64, 8, 1), 100: _tiles(16, 64, 4, 1)},
    ("keys", 64): {90: _tiles(16, 64, 8, 1)},
    ("keys", 128): {100: _tiles(16, 64, 8, 1)},
    ("keys_signed", 64): {90: _tiles(16, 64, 8, 1)},
    ("keys_signed", 128): {100: _tiles(16, 64, 8, 1)},
    ("values", 64): {90: _tiles(32, 64, 8, 1)},
    ("values", 128): {90: _tiles(32, 64, 8, 1)},
}
for _table, _class in [(key[0], key[2]) for key in TABLE if key[0].startswith("attention_") and key[1] == "tf32"]:
    TABLE[_table, "fp16", _class] = dict(TABLE[_table, "tf32", _class])
for (_side, _size), _rows in _FLOAT16_LARGE.items():
    TABLE[f"attention_{_side}", "fp16", f"d{_size}"] |= _rows
