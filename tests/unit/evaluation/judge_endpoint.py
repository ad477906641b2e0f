"""An OpenAI-compatible endpoint on this machine whose verdicts are a function of what it is shown."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = str | tuple[int, dict[str, str], str]


class Endpoint:
    """Answers chat completions.

    `decide(system, content)` gets the parsed JSON of the user turn and gives the reply's text, or a status with headers
    and body.
    """

    def __init__(self, decide: Callable[[str, dict[str, str]], Reply]) -> None:
        self.requests: list[tuple[dict, dict[str, str]]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((body, dict(self.headers)))
                system, user = body["messages"]
                reply = decide(system["content"], json.loads(user["content"]))
                if isinstance(reply, str):
                    text = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
                    reply = (200, {}, text)
                status, headers, text = reply
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()
