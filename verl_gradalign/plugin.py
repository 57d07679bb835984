# SPDX-License-Identifier: Apache-2.0
"""What verl loads: the entry point of the group `verl.plugins`, run at the end of `import verl` in every process.

It only registers import hooks. Nothing heavy is imported until verl itself imports the module that a hook waits for,
and without `gradalign` in the configuration none of the hooks changes what verl does. verl swallows errors of plugins
(it logs them at debug level), so failures are reported here, as errors.
"""

import importlib.metadata
import logging
import os
import traceback
from collections.abc import Callable
from types import ModuleType

logger = logging.getLogger("verl_gradalign")

VERL_MINIMUM = (0, 9, 1)
VERL_BELOW = (0, 10)


def report_failure(what: str, error: BaseException) -> None:
    """Log that the plugin is off in this process, why, and what to do about it."""
    logger.error(
        "verl-gradalign could not be loaded (%s): %s: %s\n%s"
        "Remedy: `pip install --force-reinstall verl-gradalign` in this environment (it needs verl >= 0.9.1, < 0.10), "
        "or VERL_USE_EXTERNAL_PLUGINS=none to run verl without plugins. Until then trainer_mode=gradalign and "
        "+gradalign=... do not exist.",
        what,
        type(error).__name__,
        error,
        "".join(traceback.format_exception(error)),
    )


def check_verl_version(version: str) -> None:
    """Raise ImportError if `version` of verl is not one that this plugin was built for."""
    from packaging.version import Version

    release = Version(version).release
    if not VERL_MINIMUM <= release[:3] or not release[:2] < VERL_BELOW:
        raise ImportError(f"verl {version} is installed, but this plugin needs verl >= 0.9.1, < 0.10")


def _reporting_failure(what: str, action: Callable[[], None]) -> Callable[[ModuleType], None]:
    """Wrap a hook so that its failure is reported instead of breaking verl's own import of the hooked module."""

    def hook(_module: ModuleType) -> None:
        try:
            action()
        except Exception as error:
            report_failure(what, error)

    return hook


def search_path_plugin() -> type:
    """Return what makes the configuration groups of this package known to Hydra, behind verl's own."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class GradAlignSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append(provider="verl-gradalign", path="pkg://verl_gradalign.configs")

    return GradAlignSearchPath


def _register_search_path() -> None:
    from hydra.core.plugins import Plugins

    Plugins.instance().register(search_path_plugin())


def _register_trainer() -> None:
    # They register themselves.
    import verl_gradalign.integration.offline.trainer
    import verl_gradalign.integration.trainer  # noqa: F401


def _refuse_old_trainer(_module: ModuleType) -> None:
    """Raise ValueError in a run that asks for selection and for verl's old trainer, which would train without it.

    verl imports that trainer only to run it, in the process in which Hydra has composed the configuration.
    """
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return
    groups, overrides = HydraConfig.get().runtime.choices, HydraConfig.get().overrides.task
    if {"gradalign", "regime"} & set(groups) or any(key.lstrip("+").startswith("gradalign.") for key in overrides):
        from verl_gradalign.integration.trainer_modes import OLD_TRAINER

        raise ValueError(f"trainer.use_v1=False: {OLD_TRAINER}. Remedy: set trainer.use_v1=True.")


def register_import_hooks() -> None:
    """Register the post-import hooks. Raises whatever goes wrong; the caller reports it."""
    import wrapt

    check_verl_version(importlib.metadata.version("verl"))
    hooks = {
        "hydra.core.plugins": _reporting_failure("Hydra search path", _register_search_path),
        "verl.trainer.ppo.v1.trainer_sync": _reporting_failure("trainer", _register_trainer),
        "verl.trainer.main_ppo_v0": _refuse_old_trainer,
    }
    for module, hook in hooks.items():
        wrapt.register_post_import_hook(hook, module)
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from verl_gradalign.cpu.registration import register_cpu_hooks

        register_cpu_hooks(_reporting_failure)


try:
    register_import_hooks()
except Exception as error:
    report_failure("plugin", error)
