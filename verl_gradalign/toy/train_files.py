# SPDX-License-Identifier: Apache-2.0
"""Train files of a miniature other than its pool: what an oracle would train on, and the pool with the trusted set.

    write_oracle(MINIATURES["imbalance_mini"], folder)
    write_mixed(folder, num_batches=40, batch_size=32, seed=0)

Both read what `regimes.write_miniature` has written into the folder.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl_gradalign.toy.regimes import Miniature

TRUSTED_SHARE = 0.5
"""Of every batch of the mixed file."""


def write_oracle(miniature: Miniature, folder: Path) -> Path:
    """Write oracle.parquet, the pool's useful problems alone, and return its path."""
    pool = pq.read_table(folder / "pool.parquet")
    infos = pool.column("extra_info").to_pylist()
    is_useful = [miniature.is_useful(info["family"], info["corrupted"]) for info in infos]
    return _write(pool.filter(pa.array(is_useful)), folder / "oracle.parquet")


def write_mixed(folder: Path, num_batches: int, batch_size: int, seed: int) -> Path:
    """Write mixed.parquet, whole batches in the order in which they are trained on, and return its path.

    Half of every batch is of the trusted set and half of the pool, each gone through in shuffled passes, so that no
    problem is drawn again before all have been. It is to be read in order (data.shuffle=false).
    """
    pool, trusted = (pq.read_table(folder / f"{split}.parquet") for split in ("pool", "trusted"))
    rng = np.random.default_rng(seed)
    num_trusted = round(TRUSTED_SHARE * batch_size)
    from_pool = _passes(len(pool), num_batches * (batch_size - num_trusted), rng).reshape(num_batches, -1)
    from_trusted = len(pool) + _passes(len(trusted), num_batches * num_trusted, rng).reshape(num_batches, -1)
    rows = rng.permuted(np.hstack([from_pool, from_trusted]), axis=1).ravel()
    return _write(pa.concat_tables([pool, trusted]).take(pa.array(rows)), folder / "mixed.parquet")


def _passes(num_rows: int, num_wanted: int, rng: np.random.Generator) -> np.ndarray:
    num_passes = -(-num_wanted // num_rows)
    return np.concatenate([rng.permutation(num_rows) for _ in range(num_passes)])[:num_wanted]


def _write(table: pa.Table, path: Path) -> Path:
    pq.write_table(table, path)
    return path
