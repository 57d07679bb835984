# SPDX-License-Identifier: Apache-2.0
"""The page's example of scoring without verl runs as it stands, and gives the oracle's scores."""

import re
from pathlib import Path

import torch

from tests.numerics.problems import VOCABULARY, build_model, expected_scores, load_float64, with_coefficients

PAGE = Path(__file__).parents[2] / "recipes" / "how_to" / "without_verl.md"
RTOL_FLOAT64 = 1e-10  # measured 2e-14


def test_the_pages_example_gives_the_oracles_cosines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tests.numerics.problems.TEMPERATURE", 1.0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = [block for block in blocks if "score_problems" in block]
    model = load_float64(build_model(tmp_path, "qwen2", tie_word_embeddings=True))
    generator = torch.Generator().manual_seed(0)

    def sample() -> tuple[list[int], list[list[int]], list[float]]:
        responses = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (3, 6, 4)]
        return torch.randint(VOCABULARY, (5,), generator=generator).tolist(), responses, [1.0, 0.0, 0.0]

    samples = [sample() for _ in range(8)]
    namespace = {"model": model, "trusted_samples": samples[:3], "candidate_samples": samples[3:]}
    exec(compile(code, str(PAGE), "exec"), namespace)

    def problem(prompt: list[int], responses: list[list[int]], rewards: list[float]):
        mean = sum(rewards) / len(rewards)
        tensors = [torch.tensor(response) for response in responses]
        return with_coefficients(torch.tensor(prompt), tensors, [r - mean for r in rewards], "token-mean")

    problems = [problem(*each) for each in samples]
    dot_P, norm_P, _ = expected_scores(model, problems[:3], problems[3:])
    torch.testing.assert_close(namespace["scores"].cosine_P, dot_P / norm_P, rtol=RTOL_FLOAT64, atol=0.0)
    assert namespace["best"].tolist() == (dot_P / norm_P).argsort(descending=True).tolist()
