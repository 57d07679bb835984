# SPDX-License-Identifier: Apache-2.0
"""Whether two mathematical answers are the same: spelling, tokens, values, and their equality."""
