# SPDX-License-Identifier: Apache-2.0
"""Whether a model's path is at hand: a folder, cached, or on a hub that answers. Says so in seconds."""

import functools
import os
import threading
import urllib.error
import urllib.request

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from verl_gradalign.errors import refuse

TIMEOUT_S = 4.0


def is_cached(key: str, path: str, file: str = "config.json") -> bool:
    """Return whether `path` must not be looked up on the hub: it is a folder, or `file` of it lies in the cache.

    Raises: ValueError that names key and path if it is neither, and the hub cannot be asked either.
    """
    if os.path.isdir(path):
        return True
    if os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1:
        refuse(key, path, "no such folder", "give the folder of a model in the format of transformers, or a hub id")
    try:
        if isinstance(try_to_load_from_cache(path, file), str):
            return True
    except HFValidationError as error:
        refuse(key, path, f"no folder and no hub id ({error})", "give the folder of a model, or a hub id")
    if constants.HF_HUB_OFFLINE or not hub_answers(constants.ENDPOINT):
        why = f"neither a folder nor in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} does not answer"
        refuse(key, path, why, f"hf download {path} where there is a network, or give a folder")
    return False


@functools.cache
def hub_answers(endpoint: str) -> bool:
    """Return whether the hub answers within seconds. Asked once."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_S).close()
            answered.set()
        except urllib.error.HTTPError:  # an answer, whatever it says
            answered.set()
        except (OSError, ValueError):
            return

    # In a thread, as looking up a name has a timeout of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(TIMEOUT_S)
    return answered.is_set()
