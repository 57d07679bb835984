# SPDX-License-Identifier: Apache-2.0
"""Where verl is imported: trainer, sampler, worker and engine adapter. No maths."""

# verl's trainer imports this package's through the plugin's hook. Importing it here, before any module of this package,
# keeps the hook from finding one of them half imported, whichever is asked for first.
import verl.trainer.ppo.v1.trainer_sync  # noqa: F401
