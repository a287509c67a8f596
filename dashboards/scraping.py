"""How Prometheus finds the endpoints: the one of a job on the head node, those of replicas, and Ray's own."""

from __future__ import annotations

from typing import Any, Final

JOB: Final = "holoray"
REPLICAS: Final = "holoray-replicas"
JOB_PORT: Final = 8090  # the --metrics-port of docs/cluster.md; beside Ray's 8080, and not node_exporter's 9100
SCRAPE_INTERVAL: Final = "1s"  # a warm-up takes seconds, and an answer has some 150 lines
RAY_DASHBOARD: Final = "127.0.0.1:8265"


def prometheus_config(
    *, job: str = f"127.0.0.1:{JOB_PORT}", targets: str = "targets/*.yml", dashboard: str = RAY_DASHBOARD
) -> dict[str, Any]:
    """A configuration of Prometheus; paths in it count from the folder of the file."""
    ours = {"scrape_interval": SCRAPE_INTERVAL, "scrape_timeout": SCRAPE_INTERVAL}
    return {
        "global": {"scrape_interval": "10s", "evaluation_interval": "5s"},
        "rule_files": ["recording.yml", "alerts.yml"],
        "scrape_configs": [
            # Down whenever no job runs, which is no fault.
            {"job_name": JOB, **ours, "static_configs": [{"targets": [job]}]},
            # Listed because they are to be up: HolorayReplicaDown.
            {"job_name": REPLICAS, **ours, "file_sd_configs": [{"files": [targets], "refresh_interval": "5s"}]},
            # The same list as in Ray's prom_metrics_service_discovery.json, which a container would hide.
            {"job_name": "ray", "http_sd_configs": [{"url": f"http://{dashboard}/api/prometheus/sd"}]},
        ],
    }
