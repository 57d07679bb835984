# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign score`: a pool scored once, without training."""
