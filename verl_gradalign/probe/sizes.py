# SPDX-License-Identifier: Apache-2.0
"""How much the probe holds at a time, and which of the three forms in `matrix_scores` is the fastest.

Without torch, as the cost calculator counts with the same numbers.
"""

CHUNK_ELEMENTS = 2**26
"""Logits converted to float32 at a time: 256 MiB."""
MAX_GRADIENT_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Elements of all gradients formed at a time: on a CPU what its cache holds, on a GPU 256 MiB in float32."""
BALANCE_POSITIONS = {"cpu": 20, "cuda": 1024}
"""Positions whose multiplications take as long as the reads and writes that each formed gradient costs besides. On
two CPU cores measured; on a GPU computed for an H200 (16 bytes an element at 4.8 TB/s against 600 TFLOP/s), not
measured."""
PRODUCT_COST = 1.5
"""Time of a position's product with the direction, and of the Gram form's, over that of its part in a gradient:
their elementwise halves cost extra. Measured on two CPU cores."""


def fastest_form(num_positions: float, num_rows: float, num_outputs: int, num_inputs: int, device: str) -> str:
    """Return the form with the least estimated time, counted in positions that are multiplied by the whole weight."""
    balance = BALANCE_POSITIONS.get(device, BALANCE_POSITIONS["cuda"])
    times = {
        "per_row": num_positions + num_rows * balance,
        "per_problem": (1 + PRODUCT_COST) * num_positions + balance,
        "gram": PRODUCT_COST * num_positions * (1 + num_positions * (1 / num_outputs + 1 / num_inputs)),
    }
    return min(times, key=times.__getitem__)
