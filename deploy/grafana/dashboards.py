"""The two dashboards as code: `python deploy/grafana/dashboards.py` writes them beside it, as Grafana reads them."""

import json
from pathlib import Path

from panels import Json, choice, dashboard, fill_between, heatmap, lines, number, query, steps, table, timeline

FOLDER = Path(__file__).parent / "dashboards"
OF_SOURCE = '{job=~"$job", model=~"$model", source=~"$source"}'
OF_MODEL = '{job=~"$job", model=~"$model"}'
OF_JOB = '{job=~"$job"}'
OF_PROCESS = '{job=~"$job", instance=~"$instance"}'
BY_SOURCE = "{{model}} {{version}} {{source}}"

RATIO = f"job_model_version_source:anomaly_outliers:ratio_rate30m{OF_SOURCE}"
EXPECTED = f"job_model_version_source:anomaly_expected_outlier_ratio:max{OF_SOURCE}"
TOLERATED = f"job_model_version_source:anomaly_tolerated_outlier_ratio:max{OF_SOURCE}"
ERROR = f"job_model_version_source:anomaly_outliers:standard_error30m{OF_SOURCE}"
SCORED = f"anomaly_images_scored_total{OF_SOURCE}"
OUTLIERS = f"anomaly_outliers_total{OF_SOURCE}"
P_BELOW = f"sum by (le) (rate(anomaly_p_value_bucket{OF_SOURCE}[30m]))"
P_ALL = f"(sum(rate(anomaly_p_value_count{OF_SOURCE}[30m])) > 0)"


def outliers() -> Json:
    """Are there more outliers than normal pictures would give, where, and may the verdicts be trusted?"""
    variables = [
        choice("job", "Job", "label_values(anomaly_model_info, job)"),
        choice("model", "Model", 'label_values(anomaly_model_info{job=~"$job"}, model)'),
        choice("source", "Source", f"label_values(anomaly_images_scored_total{OF_MODEL}, source)"),
    ]
    rows = {
        "Now": _now(),
        "Rates": _rates(),
        "p-values": _p_values(),
        "Alarms": _alarms(),
        "Calibration": _calibration(),
    }
    text = "Outlier rates against what is expected of normal pictures, alarms, and the age of the calibration."
    return dashboard("anomaly-outliers", "Anomaly detection: outliers", text, variables, rows)


def _now() -> list[Json]:
    red = steps((None, "green"), (1, "red"))
    return [
        number("Firing alerts", 'count(ALERTS{alertname=~"Anomaly.*", alertstate="firing"}) or vector(0)',
               "docs/alerts.md says what each means.", limits=red),
        number("Pictures, 24 h", f"sum(increase({SCORED}[1d]))", "Scored within a day."),
        number("Outliers, 24 h", f"sum(increase({OUTLIERS}[1d]))", "By the policy in force when they came."),
        number("Outlier rate, 24 h", f"sum(increase({OUTLIERS}[1d])) / (sum(increase({SCORED}[1d])) > 0)",
               "Of all chosen models and sources together.", "percentunit"),
        number("Largest excess", f"max(({RATIO} - {TOLERATED}) / {ERROR})",
               "Standard errors above what is tolerated, of the source that has most; alerts fire from 5 on.", "none",
               steps((None, "green"), (3, "orange"), (5, "red"))),
        number("Oldest calibration", f"max(job_model_version:anomaly_calibration_age_seconds:max{OF_MODEL})",
               "Since the normals that rank verdicts were scored.", "s",
               steps((None, "green"), (60 * 86400, "orange"), (90 * 86400, "red"))),
    ]  # fmt: skip


def _rates() -> list[Json]:
    upper, lower = "upper limit", "lower limit"
    band = [
        query(RATIO, "rate {{model}} {{version}}"),
        query(EXPECTED, "expected {{model}} {{version}}"),
        query(f"max({TOLERATED} + 5 * {ERROR})", upper),
        query(f"min(clamp_min({EXPECTED} - 5 * {ERROR}, 0))", lower),
    ]
    excess = f"({RATIO} - {TOLERATED}) / {ERROR}"
    return [
        lines("Outlier rate of $source, 30 minutes", band,
              "The band is what chance and the calibration can explain: five standard errors around the expectation. "
              "With several models it is the widest.",
              "percentunit", overrides=fill_between(upper, lower), repeat="source", repeatDirection="h", maxPerRow=3),
        lines("Excess over what is tolerated", [query(excess, BY_SOURCE)],
              "(rate - expected, or declared of the source) / standard error, of the last 30 minutes.", "none",
              steps((None, "green"), (5, "red"))),
        lines("Pictures", [query(f"sum by (model, source) (rate({SCORED}[$__rate_interval]))", "{{model}} {{source}}")],
              "Scored a second. Below 50 in half an hour no rate is judged.", "ops"),
    ]  # fmt: skip


def _p_values() -> list[Json]:
    small = [
        query(f'sum(rate(anomaly_p_value_bucket{{job=~"$job", model=~"$model", source=~"$source", le="{at}"}}[30m]))'
              f" / {P_ALL}", f"p <= {at}")
        for at in ("0.01", "0.05", "0.1", "0.5")
    ]  # fmt: skip
    return [
        heatmap("p-values", f"sum by (le) (increase(anomaly_p_value_bucket{OF_SOURCE}[$__rate_interval]))",
                "Pictures by bucket. Those of normal pictures are spread evenly from 0 to 1."),
        lines("Share of small p-values", small,
              "Of normal pictures the share with p <= a is about a. All lines up: the pictures have shifted; the "
              "lowest alone: there are more outliers.", "percentunit"),
    ]  # fmt: skip


def _alarms() -> list[Json]:
    evidence = f"max by (model, version, source) (anomaly_rate_alarm_evidence{OF_SOURCE})"
    effect = f"max by (model, version, source, part) (anomaly_shift_effect{OF_SOURCE})"
    raised = f"max by (model, version, source, kind) (anomaly_alarm_raised{OF_SOURCE})"
    firing = 'max by (alertname, model, source, instance) (ALERTS{alertname=~"Anomaly.*", alertstate="firing"})'
    return [
        timeline("Firing alerts", [query(firing, "{{alertname}} {{model}} {{source}} {{instance}}")],
                 "Of Prometheus' rules, for everything, whatever is chosen above."),
        timeline("Raised alarms", [query(raised, "{{kind}} {{model}} {{version}} {{source}}")],
                 "The service's own: rate (more outliers than allowed) and shift (most pictures have moved)."),
        lines("Evidence of a raised outlier rate", [query(evidence, BY_SOURCE)],
              "Of the service's sequential test; it alarms at 200.", "none", steps((None, "green"), (200, "red")),
              log=True),
        lines("Shift by part", [query(effect, BY_SOURCE + " {{part}}")],
              "How far scores and codes have moved, as an effect size.", "none"),
    ]  # fmt: skip


def _calibration() -> list[Json]:
    by = "by (job, model, version)"
    columns = {
        "age": (f"max {by} (job_model_version:anomaly_calibration_age_seconds:max{OF_MODEL})", "s"),
        "normals": (f"max {by} (anomaly_calibration_normals{OF_MODEL})", "short"),
        "expected outliers": (
            f"max {by} (anomaly_expected_outlier_ratio{OF_MODEL}) and on (job, model, version) anomaly_model_info == 1",
            "percentunit",
        ),
    }
    return [
        table("Calibration in force", columns, "Recalibrate from reviewed pictures, or train again.", width=12),
        lines("Age of the calibration",
              [query(f"job_model_version:anomaly_calibration_age_seconds:max{OF_MODEL}", "{{model}} {{version}}")],
              "AnomalyCalibrationStale fires at 90 days.", "s", steps((None, "green"), (90 * 86400, "red"))),
    ]  # fmt: skip


def service() -> Json:
    """Does it answer, how fast, what is refused and why, and what does that cost?"""
    variables = [
        choice("job", "Job", "label_values(anomaly_model_info, job)"),
        choice("instance", "Process", 'label_values(anomaly_queue_depth{job=~"$job"}, instance)'),
    ]
    rows = {
        "Requests": _requests(), "Waiting and judging": _waiting(), "Processes and devices": _processes(),
        "Store": _store(),
    }  # fmt: skip
    text = "Traffic, failures and refusals, latency by stage, queue and batches, processes, devices, and the store."
    return dashboard("anomaly-service", "Anomaly detection: service", text, variables, rows)


def _requests() -> list[Json]:
    requests = f"anomaly_http_requests_total{OF_PROCESS}"
    seconds = f"anomaly_http_request_duration_seconds_bucket{OF_PROCESS}"
    rejected = f"anomaly_rejected_total{OF_PROCESS}"

    def quantile(share: float) -> str:
        return f"histogram_quantile({share}, sum by (route, le) (rate({seconds}[$__rate_interval])))"

    return [
        lines("Requests",
              [query(f"sum by (route, method) (rate({requests}[$__rate_interval]))", "{{method}} {{route}}")],
              "Answered a second, by route.", "reqps", stacked=True),
        lines("Answers by status", [query(f"sum by (code) (rate({requests}[$__rate_interval]))", "{{code}}")],
              "429: refused for want of room, or by a key's own limit. 5xx: faults, and not ready.", "reqps",
              stacked=True),
        lines("Failed or refused",
              [query(f"job:anomaly_requests_failed:ratio_rate5m{OF_JOB}", "{{job}}, 5 minutes"),
               query(f"job:anomaly_requests_failed:ratio_rate1h{OF_JOB}", "{{job}}, 1 hour"),
               query(f"job:anomaly_requests_failed:ratio_rate3d{OF_JOB}", "{{job}}, 3 days")],
              "Share of 5xx and 429, without probes and keys' own limits; 0.5% is allowed.", "percentunit",
              steps((None, "green"), (0.005, "red"))),
        lines("Without a score, by reason", [query(f"sum by (reason) (rate({rejected}[$__rate_interval])) > 0",
                                                   "{{reason}}")],
              "Pictures and requests a second that got no score.", "ops", stacked=True),
        lines("Time to answer, 99%", [query(quantile(0.99), "{{route}}")],
              "By route. Of an archive it ends with the first line.", "s"),
        lines("Time to answer, median", [query(quantile(0.5), "{{route}}")], "By route.", "s"),
    ]  # fmt: skip


def _waiting() -> list[Json]:
    stages = f"anomaly_stage_duration_seconds_bucket{OF_PROCESS}"
    by_stage = f"histogram_quantile(0.5, sum by (stage, le) (rate({stages}[$__rate_interval])))"
    judged = f"rate(anomaly_batch_size_sum{OF_PROCESS}[$__rate_interval])"
    batches = f"rate(anomaly_batch_size_count{OF_PROCESS}[$__rate_interval])"
    return [
        lines("Stages of a picture, median", [query(by_stage, "{{stage}}")],
              "read: the body; queue: until the model takes it; judge: its whole batch; draw: the heat map.", "s"),
        lines("Stages of a picture, 95%",
              [query(f"job_stage:anomaly_stage_duration_seconds:p95_5m{OF_JOB}", "{{stage}}")],
              "Over five minutes, of all processes.", "s"),
        lines("Queue", [query(f"anomaly_queue_depth{OF_PROCESS}", "{{instance}}")], "Pictures that wait.", width=8),
        lines("First in the queue", [query(f"anomaly_queue_oldest_seconds{OF_PROCESS}", "{{instance}}")],
              "How long it has waited.", "s", width=8),
        lines("Pictures a batch", [query(f"sum by (instance) ({judged}) / (sum by (instance) ({batches}) > 0)",
                                         "{{instance}}")],
              "Full batches and a long queue: the device is at its limit.", "none", width=8),
        lines("Pictures", [query(f"sum by (instance) ({judged})", "{{instance}}")], "Judged a second.", "ops"),
        heatmap("Batches", f"sum by (le) (increase(anomaly_batch_size_bucket{OF_PROCESS}[$__rate_interval]))",
                "By how many pictures were judged together."),
    ]  # fmt: skip


def _processes() -> list[Json]:
    gpu = "NVIDIA's dcgm-exporter on the same machine tells this; without it the panel is empty."
    return [
        timeline("Not reached", [query(f"1 - up{OF_PROCESS}", "{{instance}}")], "Whether Prometheus got no metrics.",
                 width=12, height=5),
        lines("Restarts", [query(f"changes(process_start_time_seconds{OF_PROCESS}[30m])", "{{instance}}")],
              "Within half an hour.", "none", width=12, height=5),
        lines("Processor", [query(f"rate(process_cpu_seconds_total{OF_PROCESS}[$__rate_interval])", "{{instance}}")],
              "Cores in use.", "none", width=8),
        lines("Memory", [query(f"process_resident_memory_bytes{OF_PROCESS}", "{{instance}}")], "Resident.", "bytes",
              width=8),
        lines("Open files", [query(f"process_open_fds{OF_PROCESS}", "{{instance}}")], "Sockets among them.", width=8),
        lines("GPU", [query("DCGM_FI_DEV_GPU_UTIL", "{{Hostname}} {{gpu}}")], gpu, "percent"),
        lines("GPU memory", [query("DCGM_FI_DEV_FB_USED", "{{Hostname}} {{gpu}}")], gpu, "decmbytes"),
    ]  # fmt: skip


def _store() -> list[Json]:
    seconds = f"anomaly_store_write_duration_seconds_bucket{OF_PROCESS}"
    lost = f"sum by (instance, what) (increase(anomaly_store_lost_total{OF_PROCESS}[$__rate_interval]))"
    slow = f"histogram_quantile(0.95, sum by (instance, le) (rate({seconds}[$__rate_interval])))"
    return [
        timeline("Store down", [query(f"1 - anomaly_store_up{OF_PROCESS}", "{{instance}}")],
                 "Scoring goes on meanwhile.", width=12, height=5),
        lines("Lost", [query(lost, "{{instance}} {{what}}")],
              "Never kept: the store was down for longer than store_buffer lasts.", "none", width=12, height=5),
        lines("Verdicts that wait", [query(f"anomaly_store_waiting{OF_PROCESS}", "{{instance}}")],
              "To be written; all of it is when the store is back."),
        lines("Time to write a batch, 95%", [query(slow, "{{instance}}")], "One transaction.", "s"),
    ]  # fmt: skip


def rendered() -> dict[str, str]:
    """File names and their content."""
    return {f"{one['uid']}.json": json.dumps(one, indent=2) + "\n" for one in (outliers(), service())}


if __name__ == "__main__":
    for name, content in rendered().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
