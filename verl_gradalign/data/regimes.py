# SPDX-License-Identifier: Apache-2.0
"""The data of known experiments, as the arguments of `prepare` that make them.

    REGIMES["unreliable"].train  # ("dapo:17000",)

Source: the three regimes of the GradAlign paper (unreliable reward, distribution imbalance, low-utility corpus) and
LearnAlign's GSM8K.
"""

from dataclasses import dataclass

__all__ = ["REGIMES", "Regime"]


@dataclass(frozen=True)
class Regime:
    """What to ask `prepare` for."""

    train: tuple[str, ...]
    trusted: tuple[str, ...]
    test: tuple[str, ...]
    corrupted_share: float = 0.0


REGIMES = {
    # Half of the problems pay a coin flip, whatever the response.
    "unreliable": Regime(("dapo:17000",), ("amc22",), ("amc23", "aime24", "aime25"), corrupted_share=0.5),
    # 11.8% of the pool are what the trusted set is about.
    "imbalance": Regime(("countdown:4000", "webinstruct:20000", "dapo:10000"), ("countdown:200",), ("countdown:500",)),
    # A large corpus of which little helps.
    "low_utility": Regime(("webinstruct:first-40000",), ("amc22",), ("amc23", "aime24", "aime25", "mmlu_pro")),
    "learnalign_gsm8k": Regime(("gsm8k",), ("gsm8k:64",), ("gsm8k",)),
}
