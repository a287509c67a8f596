"""The generated configuration at work: a real Prometheus finds the job, the replicas and Ray, and applies the rules."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from prometheus_server import Result, labels, running_server, until

from dashboards import generate
from dashboards.scraping import prometheus_config
from holoray.metrics import JobMetrics, MetricsServer

pytestmark = pytest.mark.promtool


@pytest.fixture
def job() -> Iterator[MetricsServer]:
    """A job that received a corrupt fragment."""
    metrics = JobMetrics()
    metrics.set("holoray_quality_target_ratio", 1)
    metrics.inc("holoray_fragments_total", outcome="corrupt")
    server = MetricsServer(metrics)
    yield server
    server.close()


@pytest.fixture
def dashboard(job: MetricsServer) -> Iterator[str]:
    """What Ray's dashboard answers under /api/prometheus/sd, with the job's endpoint for that of a node."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/api/prometheus/sd"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps([{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{job.port}"]}]).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            """Not a word on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_prometheus_finds_everything(job: MetricsServer, dashboard: str, tmp_path: Path) -> None:
    config = prometheus_config(job=f"127.0.0.1:{job.port}", dashboard=dashboard)
    config["global"] = dict.fromkeys(config["global"], "1s")  # or the test would wait for 10 s
    for name in config["rule_files"]:
        shutil.copy(generate.HERE / "prometheus" / name, tmp_path)
    (tmp_path / "targets").mkdir()
    replicas = [{"targets": ["127.0.0.1:1"], "labels": {"model": "gone"}}]
    (tmp_path / "targets/replicas.yml").write_text(yaml.safe_dump(replicas), encoding="utf-8")
    with running_server(tmp_path, config) as server:

        def up() -> Result | None:
            found = server.query("up")
            return found if len(found) == 3 else None

        here = f"127.0.0.1:{job.port}"
        assert until(up, 30) == {
            labels(job="holoray", instance=here): 1,
            labels(job="holoray-replicas", instance="127.0.0.1:1", model="gone"): 0,
            labels(job="ray", instance=here): 1,
        }
        recorded = until(lambda: server.query('instance:holoray_fragments_corrupt:increase10m{job="holoray"}'), 30)
        assert recorded == {labels(job="holoray", instance=here): 1}
        firing = until(lambda: server.query('ALERTS{alertname="HolorayCorruptFragments",job="holoray"}'), 30)
        assert len(firing) == 1
