# SPDX-License-Identifier: Apache-2.0
"""verl asks for its platform when it is first imported, so all tests that import it in this process share one."""

import os

os.environ["VERL_PLATFORM"] = "cpu"
# Threads that wait for others must not burn the cores: on a busy machine a policy's warm-up takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
