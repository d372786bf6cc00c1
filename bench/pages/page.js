"use strict";
// Draws the figures in the reader's colours, sorts and copies tables, and hands out each figure's numbers.
(() => {
  const FRAMES = {
    light: { ink: "#1b1f24", soft: "#57606a", line: "#d6dae0", paper: "#ffffff" },
    dark: { ink: "#e7eaee", soft: "#a3acb8", line: "#363d47", paper: "#14171c" },
  };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  let figures = [];
  let printing = false;

  async function unpacked(id) {
    const text = document.getElementById(id).textContent;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  function mode() {
    return dark.matches && !printing ? "dark" : "light";
  }

  function template(frame) {
    const axis = { gridcolor: frame.line, linecolor: frame.soft, zerolinecolor: frame.soft, tickcolor: frame.soft,
      automargin: true, title: { standoff: 8 } };
    return { layout: {
      font: { color: frame.ink, family: "system-ui, sans-serif", size: 12 },
      paper_bgcolor: frame.paper, plot_bgcolor: frame.paper, xaxis: axis, yaxis: axis,
      colorway: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
      margin: { l: 60, r: 20, t: 20, b: 50 }, hoverlabel: { align: "left" },
      modebar: { color: frame.soft, activecolor: frame.ink, bgcolor: "rgba(0,0,0,0)" },
    } };
  }

  // Black lines are the reference's: on a dark page they are white. Everything else is seen on both.
  function recoloured(value) {
    if (mode() === "light") return value;
    return JSON.parse(JSON.stringify(value)
      .replaceAll('"#000000"', '"#FFFFFF"').replaceAll("rgba(0,0,0,0.18)", "rgba(255,255,255,0.18)"));
  }

  function draw(div, figure) {
    const layout = recoloured(figure.plot.layout);
    layout.template = template(FRAMES[mode()]);
    layout.height = figure.height;
    layout.autosize = !printing;
    if (printing) layout.width = 680; // an A4 page between its margins
    if (narrow.matches && layout.showlegend !== false) {
      layout.legend = { ...layout.legend, orientation: "h", x: 0, xanchor: "left", y: -0.25, yanchor: "top" };
    }
    return Plotly.react(div, recoloured(figure.plot.data), layout, config);
  }

  const drawn = new Set();
  function drawAll(only) {
    return Promise.all([...document.querySelectorAll("[data-figure]")].map((element) => {
      const number = Number(element.dataset.figure);
      if (only && !only(number)) return null;
      drawn.add(number);
      return draw(element.querySelector(".plot"), figures[number]);
    }));
  }

  function watch() {
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries.filter((e) => e.isIntersecting)) {
        seen.unobserve(entry.target);
        const number = Number(entry.target.dataset.figure);
        if (!drawn.has(number)) drawAll((other) => other === number);
      }
    }, { rootMargin: "400px" });
    document.querySelectorAll("[data-figure]").forEach((element) => seen.observe(element));
  }

  // --- numbers

  // A name from a copied file is no formula, in whatever program the numbers are opened.
  function inert(text) {
    return /^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text)) ? `'${text}` : text;
  }

  function csv(figure) {
    const cell = (value) => {
      const text = value === null || value === undefined ? "" : typeof value === "string" ? inert(value) : String(value);
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [figure.columns, ...figure.rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  function download(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function fileName(figure) {
    const words = `${document.title} ${figure.title}`.toLowerCase().replaceAll(/[^a-z0-9]+/g, "-");
    return `${words.replaceAll(/^-|-$/g, "")}.csv`;
  }

  // --- tables

  function number(text) {
    const found = text.replaceAll("−", "-").match(/[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/i);
    return found ? Number(found[0]) : null;
  }

  function sort(header) {
    const table = header.closest("table");
    const column = [...header.parentNode.children].indexOf(header);
    const down = header.getAttribute("aria-sort") !== "descending" && header.getAttribute("aria-sort") === "ascending";
    const rows = [...table.tBodies[0].rows];
    const numeric = header.classList.contains("number") && rows.some((row) => number(row.cells[column].textContent) !== null);
    const key = (row) => (numeric ? number(row.cells[column].textContent) : row.cells[column].textContent.trim());
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what has no number stays below
      const order = numeric ? x - y : x.localeCompare(y, "en", { numeric: true });
      return down ? -order : order;
    });
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.tBodies[0].append(...rows);
  }

  async function copy(button) {
    const table = button.closest(".table").querySelector("table");
    const words = (cell) => {
      const text = cell.textContent.trim().replaceAll("\u00a0", " ");
      return cell.classList.contains("number") ? text : inert(text);
    };
    const text = [...table.rows].map((row) => [...row.cells].map(words).join("\t")).join("\n");
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const field = document.body.appendChild(document.createElement("textarea"));
      field.value = text;
      field.select();
      done = document.execCommand("copy");
      field.remove();
    }
    const label = button.textContent;
    button.textContent = done ? "Copied" : "The browser refused";
    setTimeout(() => { button.textContent = label; }, 1500);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.csv !== undefined) {
      const figure = figures[Number(button.dataset.csv)];
      download(fileName(figure), csv(figure));
    } else if (button.dataset.copy !== undefined) copy(button);
    else if (button.closest("th")) sort(button.closest("th"));
  });

  async function start() {
    figures = JSON.parse(await unpacked("figures"));
    if (figures.length) {
      const script = document.createElement("script");
      script.textContent = await unpacked("plotly");
      document.head.append(script);
      watch();
    }
    dark.addEventListener("change", () => drawAll((n) => drawn.has(n)));
    narrow.addEventListener("change", () => drawAll((n) => drawn.has(n)));
    const print = (on) => () => { printing = on; drawAll(); };
    window.addEventListener("beforeprint", print(true));
    window.addEventListener("afterprint", print(false));
    window.drawEverything = () => drawAll((n) => !drawn.has(n)); // before the reader scrolls there
  }

  start().catch((error) => {
    const place = document.getElementById("trouble");
    place.textContent = `The figures cannot be drawn: ${error.message}. The tables are whole; a newer browser may help.`;
    place.hidden = false;
    throw error;
  });
})();
