# SPDX-License-Identifier: Apache-2.0
"""What verl's workers import (`model.external_lib`) where ranks have slices of rows: it stands for flash attention."""

from tests.distributed.ulysses import install

install()
