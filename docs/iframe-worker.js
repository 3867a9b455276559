// Browsers refuse workers on pages that are opened from the disk. The search's worker then runs in a frame of the page.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inner = frame.contentWindow;
      this.inner.postMessage = (data) => this.receive(data);
      this.inner.importScripts = (...scripts) => scripts.reduce((done, script) => done.then(() => this.load(script)), Promise.resolve());
      this.ready = this.load(new URL(url, location));
    }
    load(script) {
      return new Promise((resolve, reject) => {
        const element = this.inner.document.createElement("script");
        Object.assign(element, { src: script, onload: resolve, onerror: reject });
        this.inner.document.body.append(element);
      });
    }
    receive(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      if (this.onmessage) this.onmessage(event);
    }
    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data })));
    }
    terminate() {
      this.inner.frameElement.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
