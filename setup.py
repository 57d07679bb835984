# SPDX-License-Identifier: Apache-2.0
"""Package definition of verl-gradalign (tool settings live in pyproject.toml)."""

from pathlib import Path

from setuptools import find_packages, setup

# The v1 trainer registry, the sampler key and the plugin entry points first appear together in 0.9.1.
VERL = "verl>=0.9.1,<0.10"
# Parts of verl 0.9.1 that its v1 trainer imports but its base distribution does not ask for.
VERL_V1_TRAINER = ["TransferQueue>=0.1.10,<0.2", "pyzmq", "msgspec", "cachetools", "fastapi", "uvicorn"]
# What our answers are compared with. Its extras only pick an ANTLR runtime, and Hydra, which verl needs, works with
# 4.9.3 alone; asked for by name, as pip does not find the extra under the name that it is published by.
MATH_VERIFY = ["math-verify>=0.9,<0.10", "antlr4-python3-runtime==4.9.3"]

setup(
    name="verl-gradalign",
    version="0.1.0",
    description="Train LLMs with verl on the problems whose policy gradient points along a trusted one.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    # configs/ stays at the top of the checkout, where verl users look for it, and is installed as a subpackage.
    packages=[*find_packages(include=["verl_gradalign", "verl_gradalign.*"]), "verl_gradalign.configs"],
    package_dir={"verl_gradalign.configs": "configs"},
    package_data={"verl_gradalign.configs": ["**/*.yaml"], "verl_gradalign.report": ["templates/*"]},
    install_requires=[
        VERL,
        *VERL_V1_TRAINER,
        "wrapt>=1.16",
        "pyarrow>=19",
        "rich>=13",
        "typer>=0.15,<1",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "huggingface-hub",
        "omegaconf>=2.3",
        "packaging",
        "pillow",
        "psutil>=5.9",
        "mpmath>=1.3",
    ],
    extras_require={
        # 2.13.0 is the version every number of the CPU tiers was measured with.
        "cpu": ["torch==2.13.0", "tokenizers"],
        "gpu": ["verl[vllm,fsdp]>=0.9.1,<0.10"],
        "test": [
            "pytest>=8",
            "hypothesis>=6",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "codespell>=2.3",
            *MATH_VERIFY,
        ],
        # Not with vLLM, which pins some of what these need.
        "dev": [
            "pytest-cov>=5",
            "pytest-xdist>=3",
            "pre-commit>=3",
            # What reads back what verl's loggers wrote.
            "tensorboard",
            "wandb",
            "mlflow-skinny>=3",
            # Drives the Chromium that is installed, to look at reports; its own download is not needed.
            "playwright>=1.45",
        ],
    },
    entry_points={
        "verl.plugins": ["gradalign = verl_gradalign.plugin"],
        "console_scripts": ["verl-gradalign = verl_gradalign.cli:app"],
    },
)
