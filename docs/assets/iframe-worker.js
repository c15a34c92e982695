/* A browser starts no worker from file://, and the search is a worker. This class runs it in a hidden frame instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      this.loaded = Promise.resolve()
      const load = source => new Promise((resolve, reject) => {
        const script = this.scope.document.createElement("script")
        script.src = new URL(source, url)
        script.onload = resolve
        script.onerror = reject
        this.scope.document.body.append(script)
      })
      this.scope.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve())
      this.scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.loaded = load(url)
    }
    postMessage(data) {
      this.loaded = this.loaded.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
