"""Grafana's JSON in few words: panels, rows that they flow into, variables, and a dashboard of them.

Field names and values are those of Grafana 11 (dashboard schema 39), which later versions read as well.
"""

from collections.abc import Iterable
from typing import Any

Json = dict[str, Any]
WIDTH = 24
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


def query(expression: str, legend: str = "", kind: str = "range") -> Json:
    """A PromQL expression; `kind` is range, instant, table or heatmap."""
    shape = {"table": "table", "heatmap": "heatmap"}.get(kind, "time_series")
    instant = kind in {"instant", "table"}
    return {
        "datasource": SOURCE, "editorMode": "code", "expr": expression, "legendFormat": legend or "__auto",
        "format": shape, "instant": instant, "range": not instant,
    }  # fmt: skip


def steps(*thresholds: tuple[float | None, str]) -> Json:
    """Colours from values on; the first value is None."""
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in thresholds]}


def panel(
    kind: str, title: str, queries: Iterable[Json], text: str, width: int = 12, height: int = 8, **more: Any
) -> Json:
    """A panel of any kind; `more` are fields of the panel itself. `text` is shown where the mouse rests."""
    named = [{**one, "refId": chr(ord("A") + i)} for i, one in enumerate(queries)]
    return {
        "type": kind, "title": title, "description": text, "datasource": SOURCE, "targets": named,
        "gridPos": {"w": width, "h": height, "x": 0, "y": 0}, **more,
    }  # fmt: skip


def lines(
    title: str,
    queries: Iterable[Json],
    text: str,
    unit: str = "short",
    limits: Json | None = None,
    overrides: Iterable[Json] = (),
    stacked: bool = False,
    log: bool = False,
    **more: Any,
) -> Json:
    """Lines over time; `limits` are drawn as lines too, `log` makes the axis logarithmic."""
    custom: Json = {
        "drawStyle": "line", "lineWidth": 1, "fillOpacity": 25 if stacked else 0, "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if limits else "off"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
    }  # fmt: skip
    defaults: Json = {"unit": unit, "custom": custom, "thresholds": limits or steps((None, "green"))}
    if not log:
        defaults["min"] = 0
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    config = {"defaults": defaults, "overrides": list(overrides)}
    return panel("timeseries", title, queries, text, fieldConfig=config, options=options, **more)


def number(
    title: str, expression: str, text: str, unit: str = "short", limits: Json | None = None, width: int = 4
) -> Json:
    """One number of now, coloured by `limits`."""
    defaults = {"unit": unit, "thresholds": limits or steps((None, "text")), "noValue": "-"}
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "value",
        "graphMode": "none", "justifyMode": "auto", "orientation": "auto", "textMode": "auto",
    }  # fmt: skip
    config = {"defaults": defaults, "overrides": []}
    found = [query(expression, kind="instant")]
    return panel("stat", title, found, text, width, 4, fieldConfig=config, options=options)


def heatmap(title: str, expression: str, text: str, unit: str = "short", **more: Any) -> Json:
    """Counts of a Prometheus histogram by bucket over time."""
    options = {
        "calculate": False, "cellGap": 1, "cellValues": {"unit": "short"},
        "color": {"mode": "scheme", "scheme": "Blues", "exponent": 0.5, "fill": "dark-blue", "reverse": False,
                  "scale": "exponential", "steps": 64},
        "exemplars": {"color": "rgba(255,0,255,0.7)"}, "filterValues": {"le": 1e-9}, "legend": {"show": True},
        "rowsFrame": {"layout": "auto"}, "showValue": "never", "tooltip": {"mode": "single", "showColorScale": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }  # fmt: skip
    config: Json = {"defaults": {"custom": {"scaleDistribution": {"type": "linear"}}}, "overrides": []}
    found = [query(expression, "{{le}}", "heatmap")]
    return panel("heatmap", title, found, text, fieldConfig=config, options=options, **more)


def timeline(title: str, queries: Iterable[Json], text: str, **more: Any) -> Json:
    """One bar a series, red where it is 1."""
    mapping = {
        "type": "value",
        "options": {
            "0": {"text": "no", "color": "green", "index": 0},
            "1": {"text": "yes", "color": "red", "index": 1},
        },
    }
    defaults = {
        "custom": {"lineWidth": 0, "fillOpacity": 70}, "mappings": [mapping],
        "thresholds": steps((None, "green"), (1, "red")), "noValue": "none",
    }  # fmt: skip
    options = {
        "mergeValues": True, "showValue": "never", "alignValue": "left", "rowHeight": 0.8,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }  # fmt: skip
    config = {"defaults": defaults, "overrides": []}
    return panel("state-timeline", title, queries, text, fieldConfig=config, options=options, **more)


def table(title: str, columns: dict[str, tuple[str, str]], text: str, **more: Any) -> Json:
    """One row a set of labels; `columns` by title: expression and unit."""
    found = [query(expression, kind="table") for expression, _ in columns.values()]
    letters = [chr(ord("A") + i) for i in range(len(columns))]
    names = {f"Value #{letter}": name for letter, name in zip(letters, columns, strict=True)}
    overrides = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
        for name, (_, unit) in columns.items()
    ]
    change = [
        {"id": "merge", "options": {}},
        {"id": "organize",
         "options": {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names, "includeByName": {}}},
    ]  # fmt: skip
    config = {"defaults": {"custom": {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False}},
              "overrides": overrides}  # fmt: skip
    return panel(
        "table", title, found, text, fieldConfig=config, transformations=change,
        options={"showHeader": True, "cellHeight": "sm"}, **more,
    )  # fmt: skip


def fill_between(upper: str, lower: str) -> list[Json]:
    """Overrides that shade the band between two lines, by their legends."""
    shaded = [{"id": "custom.fillBelowTo", "value": lower}, {"id": "custom.fillOpacity", "value": 15}]
    quiet = [{"id": "custom.lineWidth", "value": 0}, {"id": "color", "value": {"mode": "fixed", "fixedColor": "green"}}]
    return [
        {"matcher": {"id": "byName", "options": upper},
         "properties": [*quiet, *shaded]},
        {"matcher": {"id": "byName", "options": lower}, "properties": quiet},
    ]  # fmt: skip


def choice(name: str, label: str, labels_of: str) -> Json:
    """A variable that offers a label's values, all of them unless chosen; `labels_of`: `label_values(...)`."""
    return {
        "type": "query", "name": name, "label": label, "datasource": SOURCE, "definition": labels_of,
        "query": {"query": labels_of, "refId": f"variable-{name}"}, "refresh": 2, "sort": 1, "regex": "",
        "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]},
        "options": [], "hide": 0, "skipUrlSync": False,
    }  # fmt: skip


def dashboard(uid: str, title: str, text: str, variables: Iterable[Json], rows: dict[str, list[Json]]) -> Json:
    """Rows of panels, by their titles, each flowing from left to right."""
    source = {
        "type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus", "regex": "",
        "current": {"text": "Prometheus", "value": "prometheus"}, "options": [], "hide": 0, "refresh": 1,
        "multi": False, "includeAll": False, "skipUrlSync": False,
    }  # fmt: skip
    return {
        "uid": uid, "title": title, "description": text, "tags": ["anomaly-vae"], "schemaVersion": 39, "version": 1,
        "editable": True, "graphTooltip": 1, "refresh": "30s", "timezone": "browser", "fiscalYearStartMonth": 0,
        "time": {"from": "now-6h", "to": "now"}, "timepicker": {}, "weekStart": "", "liveNow": False,
        "templating": {"list": [source, *variables]}, "annotations": {"list": [_alerts()]},
        "links": [{"type": "dashboards", "tags": ["anomaly-vae"], "title": "Dashboards", "asDropdown": False,
                   "includeVars": True, "keepTime": True, "targetBlank": False, "icon": "external link",
                   "tooltip": "", "url": ""}],
        "panels": list(_placed(rows)),
    }  # fmt: skip


def _alerts() -> Json:
    return {
        "name": "Alerts", "datasource": SOURCE, "enable": True, "hide": False, "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Anomaly.*", alertstate="firing"}', "titleFormat": "{{alertname}}",
        "tagKeys": "source,model", "useValueForTime": False,
    }  # fmt: skip


def _placed(rows: dict[str, list[Json]]) -> Iterable[Json]:
    number, y = 1, 0
    for title, panels in rows.items():
        yield {"type": "row", "id": number, "title": title, "collapsed": False, "panels": [],
               "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}}  # fmt: skip
        number, x, y, tallest = number + 1, 0, y + 1, 0
        for one in panels:
            w, h = one["gridPos"]["w"], one["gridPos"]["h"]
            if x + w > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            yield {**one, "id": number, "gridPos": {"x": x, "y": y, "w": w, "h": h}}
            number, x, tallest = number + 1, x + w, max(tallest, h)
        y += tallest
