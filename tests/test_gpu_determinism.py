"""A generation on a GPU has the same logits and tokens in every process."""

import pytest
from gpu_determinism import run_once, same

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("config", ["python-bytes-3m", "llama3.2-1b"])
def test_processes_agree_on_logits_and_tokens(config):
    reports = [run_once("ours", config, 300, 64) for _ in range(3)]
    assert same(reports), reports
    assert len(reports[0]["tokens"]) == 2  # by the reference, and by a fused kernel
    assert all(len(report["reruns"]) == 1 for report in reports)
