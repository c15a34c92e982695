"""Metrics are in Prometheus' format."""

from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families


def test_metrics_are_prometheus_s(served: Any) -> None:
    client = served.client()
    for name in ("sql", "chat", "sql"):
        client.completions.create(model=name, prompt=[5, 6, 7], temperature=0, max_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nope", prompt=[5])
    served.wait(lambda: served.metric("peftcore_requests_total", model="none", status="404") == 1)
    text = httpx.get(f"{served.url}/metrics").text
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["peftcore_requests_total", "200", "sql"] == 2
    assert samples["peftcore_requests_total", "404", "none"] == 1
    assert samples["peftcore_prompt_tokens_total",] == 9
    assert 3 <= samples["peftcore_generated_tokens_total",] <= 12
    assert samples["peftcore_time_to_first_token_seconds_count",] == 3
    assert samples["peftcore_request_seconds_count",] == 3
    assert (samples["peftcore_adapter_misses_total",], samples["peftcore_adapter_hits_total",]) == (2, 1)
    assert samples["peftcore_queue_depth",] == 0
