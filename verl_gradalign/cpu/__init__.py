# SPDX-License-Identifier: Apache-2.0
"""What a demonstration on an ordinary CPU needs: a tiny model, and its supervised warm-up."""
