"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  // By default plotly also offers to send a chart to its makers' cloud: pictures' figures are nobody else's business.
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    plotlyServerURL: "",
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
  };

  const painted = (value, style) => {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) return value.map((part) => painted(part, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, painted(part, style)]));
  };
  const common = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: "--ink", family: "system-ui, sans-serif", size: 13 },
    margin: { l: 60, r: 20, t: 64, b: 50 },
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.1, yanchor: "bottom" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "--muted", activecolor: "--ink" },
    hoverlabel: { bgcolor: "--panel", bordercolor: "--grid", font: { color: "--ink" } },
  };
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const [name, chart] of Object.entries(figures)) {
      const { data, layout } = painted({ data: chart.data, layout: { ...common, ...chart.layout } }, style);
      Plotly.react(document.getElementById(name), data, layout, config);
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
