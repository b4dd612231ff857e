"""The Grafana dashboard of a run: the series of `series` go in, JSON for Grafana comes out.

`supmer dashboard` writes it where the Grafana configuration that Ray makes looks for dashboards, or with `--out` into
a folder from which Grafana imports it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from supmer_ray.errors import UserError, require_path, require_writable
from supmer_ray.files import write_json

DIRECTORY_VARIABLE = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"
"""Ray's own variable for the folder that its Grafana configuration names."""

PANELS = (
    ("Meta-loss by task type (nats)", ["ray_supmer_meta_loss"], "{{task_type}}"),
    ("Validation loss by task type (nats)", ["ray_supmer_validation_loss"], "{{task_type}}"),
    ("Validation accuracy by task type", ["ray_supmer_validation_accuracy"], "{{task_type}}"),
    ("Support loss by task type (nats)", ["ray_supmer_support_loss"], "{{task_type}}"),
    (
        "Query-support agreement s, mean λ, gate z",
        ["ray_supmer_similarity", "ray_supmer_running_similarity", "ray_supmer_mixing", "ray_supmer_gate"],
        "{{__name__}}",
    ),
    ("Norms of g and ψ(g)", ["ray_supmer_gradient_norm", "ray_supmer_update_norm"], "{{__name__}}"),
    ("Cosine of g and ψ(g)", ["ray_supmer_update_cosine"], "{{run}}"),
    ("Inner rate and prompt norm", ["ray_supmer_inner_rate", "ray_supmer_prompt_norm"], "{{__name__}}"),
    ("Seconds of a step by phase", ["ray_supmer_phase_seconds"], "{{phase}}"),
    ("Seconds of a step", ["ray_supmer_step_seconds"], "{{run}}"),
    ("Share of the time spent waiting for tasks", ["ray_supmer_data_wait_fraction"], "{{run}}"),
    ("Tasks a second", ["ray_supmer_tasks_per_second"], "{{run}}"),
    ("Tokens a second", ["ray_supmer_tokens_per_second"], "{{run}}"),
    ("GPU memory (bytes)", ["ray_supmer_gpu_memory_bytes"], "{{run}}"),
    ("Steps done, and steps skipped", ["ray_supmer_step", "ray_supmer_skipped_steps"], "{{__name__}}"),
)
"""Title, series and legend of each panel."""


def make_dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; it asks for the Prometheus source and the run by name."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = []
    for number, (title, series, legend) in enumerate(PANELS):
        targets = [
            {
                "datasource": source,
                "expr": f'{name}{{run=~"$run", SessionName=~"$session"}}',
                "legendFormat": f"{legend} {{{{run}}}}" if legend != "{{run}}" else legend,
                "refId": chr(ord("A") + place),
            }
            for place, name in enumerate(series)
        ]
        panels.append(
            {
                "id": number + 1,
                "type": "timeseries",
                "title": title,
                "datasource": source,
                "gridPos": {"h": 8, "w": 8, "x": number % 3 * 8, "y": number // 3 * 8},
                "fieldConfig": {"defaults": {"custom": {"lineWidth": 1, "spanNulls": True}}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                "targets": targets,
            }
        )

    def variable(name: str, series_label: str, label: str) -> dict[str, Any]:
        query = f"label_values(ray_supmer_step, {series_label})"
        return {
            "name": name,
            "type": "query",
            "datasource": source,
            "query": {"query": query, "refId": "Variable"},
            "definition": query,
            "label": label,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
            "refresh": 2,
            "sort": 2,
        }

    return {
        "uid": "supmerMetaTraining",
        "title": "SUPMER meta-training",
        "tags": ["supmer"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source", "refresh": 1},
                variable("session", "SessionName", "Ray session"),
                variable("run", "run", "Run"),
            ]
        },
        "panels": panels,
    }


def write_dashboard(folder: Path | None = None) -> Path:
    """Write the dashboard for Grafana to find.

    Args:
        folder: unset: that of the running cluster's Grafana configuration on this machine.

    Raises:
        UserError: no cluster has run on this machine, so nothing would look there, or the folder cannot be written.
    """
    if folder is None:
        from ray._common.utils import get_default_ray_temp_dir

        named = os.environ.get(DIRECTORY_VARIABLE)
        session = Path(get_default_ray_temp_dir()) / "session_latest"
        folder = Path(named) if named else session / "metrics" / "grafana" / "dashboards"
        if not folder.is_dir():
            raise UserError(
                f"Ray's Grafana configuration is not at {folder}; run this on the head node after 'ray start --head', "
                f"or name a folder with --out."
            )
    require_path(folder)
    target = folder / "supmer_grafana_dashboard.json"
    require_writable(target)
    write_json(target, make_dashboard())
    return target
