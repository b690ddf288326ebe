// The search runs in a Worker, which browsers refuse to pages that are opened from the disk: there, an iframe runs it.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.receive = data => this.dispatchEvent(new MessageEvent("message", { data }))
      frame.srcdoc =
        "<script>window.postMessage = data => frameElement.receive(data)</script>" + `<script src="${url}"></script>`
      this.frame = frame
      this.scope = new Promise(resolve => (frame.onload = () => resolve(frame.contentWindow)))
      document.body.append(frame)
    }

    postMessage(data) {
      this.scope.then(scope => scope.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
