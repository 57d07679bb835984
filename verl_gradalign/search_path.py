# SPDX-License-Identifier: Apache-2.0
"""Makes `+gradalign=...`, `+platform=...` and `+regime=...` known to Hydra in verl's own entry point."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class GradAlignSearchPath(SearchPathPlugin):
    """Appends the package's configuration groups behind verl's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append `pkg://verl_gradalign.configs`."""
        search_path.append(provider="verl-gradalign", path="pkg://verl_gradalign.configs")
