# SPDX-License-Identifier: Apache-2.0
"""Problems with verifiable answers, in verl's parquet schema, and the reward function that checks them."""
