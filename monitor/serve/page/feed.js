// An event stream that comes back by itself, rests while nobody sees the page, and says when the
// server asks for a key.

const FIRST_WAIT = 1000;
const LONGEST_WAIT = 10000;

export class Feed {
  // handlers: event name to function of its content. on: connected(), lost(), locked(), gone().
  constructor(path, handlers, on) {
    this.path = path;
    this.handlers = handlers;
    this.on = on;
    this.wait = FIRST_WAIT;
    this.whenSeen = () => (document.hidden ? this.rest() : this.open());
    document.addEventListener("visibilitychange", this.whenSeen);
    this.open();
  }

  open() {
    if (this.source || this.closed) return;
    const source = (this.source = new EventSource(this.path));
    source.onopen = () => {
      this.wait = FIRST_WAIT;
      this.on.connected?.();
    };
    source.onerror = () => this.failed();
    for (const [name, handle] of Object.entries(this.handlers)) {
      source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
    }
  }

  // Whether the browser tries again by itself or not, this does, and asks first what is the matter.
  async failed() {
    this.rest();
    this.on.lost?.();
    let session = null;
    try {
      session = await (await fetch("/live/session", { cache: "no-store" })).json();
    } catch {
      // no server, or not this one: try again
    }
    if (this.closed) return;
    if (session?.open === false) {
      this.close();
      this.on.locked?.();
    } else if (this.on.gone && session && this.tries++ > 1) {
      this.close();
      this.on.gone();
    } else {
      this.timer = setTimeout(() => document.hidden || this.open(), this.wait);
      this.wait = Math.min(this.wait * 2, LONGEST_WAIT);
    }
  }

  tries = 0;

  rest() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }

  close() {
    this.closed = true;
    this.rest();
    document.removeEventListener("visibilitychange", this.whenSeen);
  }
}
