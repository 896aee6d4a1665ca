"""The Triton templates as Inductor takes them, one per operator and base format. The kernels are in `templates/`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from rosa_fx.kernels.convert import byte_asm
from rosa_fx.kernels.lookup import few_asm, few_words, pair_asm, pair_words, permute_asm, select_tree, stretched, table

FOLDER = Path(__file__).resolve().parent / "templates"

# What bitsandbytes multiplies int8 codes by, beside the scale of the row: its float32 of 1 / 127.
INT8_STEP = 7.874015718698502e-3

# Dtypes of 16 bits as the templates name them.
NARROW = {"tl.bfloat16": torch.bfloat16, "tl.float16": torch.float16}

_TILES = {"nf4": "fourbit", "fp4": "fourbit", "int8": "int8", "dense": "dense"}
_WEIGHT_ARGUMENTS = {
    "fourbit": '["Q", "ABSMAX"] + (["NESTED_ABSMAX", "NESTED_OFFSET", "CODE"] if DOUBLE_QUANT else [])',
    "int8": '["Q", "ABSMAX"]',
    "dense": '["W"]',
}


# What follows the address of a load from the weight, by conditions on its rows and columns: nothing, where tiles fit.
_MASKED = """{% macro masked(row, column) -%}
{% if ROW_MASK and row and COLUMN_MASK and column %}, mask={{row}} & {{column}}, other=0
{%- elif ROW_MASK and row %}, mask={{row}}, other=0
{%- elif COLUMN_MASK and column %}, mask={{column}}, other=0
{%- endif %}
{%- endmacro %}"""


def source(operator: str, kind: str) -> str:
    """The Jinja source of `operator` ("linear", "linear_few", "linear_t" or "scratch") for a base of `kind`.

    Symbols: M rows of activations, weight [N, K] as stored, R rank. BLOCK_*: the tile of one program; TILE_N, TILE_K: the tile
    of the weight that it decodes, at row tile_row0 + tile_lane and column tile_k0; ROW_MASK, COLUMN_MASK: whether a tile may
    reach beyond the weight, X_MASK: beyond the rows of X. FEW: few rows; GROUP_K: columns of one product in linear_few, which
    have one scale per row. X the activations, Q packed codes (W a dense weight), ABSMAX and NESTED_*: scales, XA = x Aᵀ and
    XB = x B, DTYPE the dtype of the product, FLAT the integer dtype of flat positions in the weight.
    """
    tile = _TILES[kind]
    head = [
        f"{{% set WEIGHT = {_WEIGHT_ARGUMENTS[tile]} %}}",
        '{% set SPARSE_PARTS = ["VALUES", "ROW_OFFSETS", "COLS"] if SPARSE else [] %}',
        f"{{% set INT8 = {tile == 'int8'} %}}",
        f"{{% set SCALE_IN_TILE = {operator != 'linear'} %}}",
        f"{{% set MAIN_LOOP = {operator != 'scratch'} %}}",
        _MASKED,
    ]
    if tile == "int8":
        for name, scaled in (("BYTE_ASM", False), ("SCALED_BYTE_ASM", True)):
            head.append(f"{{% set {name} = { {dtype: byte_asm(narrow, scaled) for dtype, narrow in NARROW.items()}!r} %}}")
    if tile == "fourbit":
        tree = select_tree(table(kind), "{{code}}")
        head += [
            f"{{% macro lookup(code) -%}} {tree} {{%- endmacro %}}",
            f"{{% set LOOKUP_ASM = {permute_asm(table(kind))!r} %}}",
        ]
        narrow = {name: stretched(kind, dtype) for name, dtype in NARROW.items()}
        pairs = {name: pair_asm(values, NARROW[name]) for name, (values, _) in narrow.items()}
        words = {name: pair_words(values, NARROW[name]) for name, (values, _) in narrow.items()}
        few = {name: few_asm(values, NARROW[name], True) for name, (values, _) in narrow.items()}
        few_codes = {name: few_asm(values, NARROW[name], False) for name, (values, _) in narrow.items()}
        constants = {name: few_words(values, NARROW[name]) for name, (values, _) in narrow.items()}
        trees = {name: select_tree(values, "tile_code") for name, (values, _) in narrow.items()}
        factors = {name: factor for name, (_, factor) in narrow.items()}
        head += [
            f"{{% set PAIR_ASM = {pairs!r} %}}",
            f"{{% set WORDS = {words!r} %}}",
            f"{{% set FEW_ASM = {few!r} %}}",
            f"{{% set FEW_CODES = {few_codes!r} %}}",
            f"{{% set FEW_WORDS = {constants!r} %}}",
            f"{{% set TREES = {trees!r} %}}",
            f"{{% set FACTORS = {factors!r} %}}",
        ]
    parts = [*head, (FOLDER / f"tile_{tile}.jinja").read_text()]
    if operator in ("linear", "linear_few"):
        parts.append((FOLDER / "linear_sums.jinja").read_text())
    parts.append((FOLDER / f"{operator}.jinja").read_text())
    return "\n".join(parts)


@functools.cache
def template(operator: str, kind: str) -> Any:
    """The template "rosa_{operator}_{kind}"; its kernels are named after it."""
    from rosa_fx.kernels import inductor

    return inductor.triton_template(f"rosa_{operator}_{kind}", operator == "scratch", source(operator, kind))


@functools.cache
def sparse_template() -> Any:
    """The template "rosa_sparse" of S xᵀ, the same for every base."""
    from rosa_fx.kernels import inductor

    return inductor.triton_template("rosa_sparse", True, (FOLDER / "sparse.jinja").read_text())
