/* A browser starts no worker from file://, and the search is a worker. This class runs it in a hidden frame instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const worker = new URL(url, location.href)
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      const load = source => new Promise((resolve, reject) => {
        const script = this.scope.document.createElement("script")
        script.src = new URL(source, worker)
        script.onload = resolve
        script.onerror = reject
        this.scope.document.body.append(script)
      })
      this.scope.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve())
      this.scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.loaded = load(worker)
    }
    postMessage(data) {
      this.loaded = this.loaded.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
