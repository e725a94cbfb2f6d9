// The rows, as told by the server, and in the order in which they are shown.

const SPARK = 40;
const RESORT = 2000; // ms: an order by risk that changed ten times a second could not be read

export class Store {
  rows = new Map();
  bundles = {};
  filter = "all";
  order = "newest";
  halts = null;
  counts = null;
  engine = null;
  notices = [];
  text = false;
  #sorted = [];
  #sortedAt = 0;
  #stale = true;

  snapshot(content) {
    this.rows.clear();
    this.text = content.text;
    this.take(content);
  }

  // Returns the rows that were halted since.
  take(news) {
    const halted = [];
    for (const change of news.rows) {
      const row = this.rows.get(change.n);
      if (row === undefined) {
        this.rows.set(change.n, change);
        if (change.state === "halted") halted.push(change);
        this.#stale = true;
        continue;
      }
      if (change.state === "halted" && row.state !== "halted") halted.push(row);
      if (change.state !== undefined) this.#stale = true;
      const whole = change.ended && !row.ended;
      const spark = whole ? change.spark : row.spark.concat(change.spark).slice(-SPARK);
      Object.assign(row, change, { spark });
    }
    for (const number of news.gone ?? []) {
      this.rows.delete(number);
      this.#stale = true;
    }
    for (const key of ["halts", "counts", "engine", "notices", "bundles"]) {
      if (news[key] !== undefined) this[key] = news[key];
    }
    return halted;
  }

  show(filter, order) {
    this.filter = filter;
    this.order = order;
    this.#stale = true;
    this.#sortedAt = 0;
  }

  // Rows in the order shown.
  get shown() {
    const now = performance.now();
    const due = this.order === "newest" ? this.#stale : now - this.#sortedAt > RESORT;
    if (due) {
      const rows = [...this.rows.values()].filter((row) => matches(row, this.filter));
      rows.sort(this.order === "newest" ? (a, b) => b.n - a.n : byRisk);
      this.#sorted = rows;
      this.#sortedAt = now;
      this.#stale = false;
    }
    return this.#sorted;
  }

  get numbers() {
    const found = { all: 0, open: 0, halted: 0, held: 0 };
    for (const row of this.rows.values()) {
      found.all++;
      if (!row.ended) found.open++;
      if (row.state === "halted") found.halted++;
      if (row.state === "held") found.held++;
    }
    return found;
  }

  get latestHalt() {
    return [...this.rows.values()].filter((row) => row.state === "halted").at(-1);
  }
}

const matches = (row, filter) =>
  filter === "all" || (filter === "open" ? !row.ended : row.state === "halted");

// Those in flight first: only there can anything be done.
const byRisk = (a, b) =>
  a.ended - b.ended || (b.risk ?? -1) - (a.risk ?? -1) || b.n - a.n;
