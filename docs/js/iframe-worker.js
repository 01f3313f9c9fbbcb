// Browsers start no worker for a page that is opened as a file. There, the site's search runs in a hidden frame, to
// which this class gives a worker's messages. Zensical's plugin `offline` loads another such script from the network,
// unless mkdocs.yml names one of this name.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => this.onmessage?.({ data });
      const script = inside.document.createElement("script");
      this.started = new Promise((resolve) => (script.onload = resolve));
      script.onerror = (event) => this.onerror?.(event);
      script.src = url;
      inside.document.body.append(script);
    }

    postMessage(data) {
      this.started.then(() => this.frame.contentWindow?.onmessage({ data }));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
