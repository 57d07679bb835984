# SPDX-License-Identifier: Apache-2.0
"""Before a run: what a machine, a configuration, its data and its model are found to be, as findings."""
