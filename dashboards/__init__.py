"""What people watch: the Grafana board, Prometheus' configuration, its rules. All of it is generated from here.

`python -m dashboards.generate` rewrites `dashboards/grafana` and `dashboards/prometheus`; see docs/dashboards.md and
docs/adr/0012-dashboards-are-generated.md.
"""
