"""A local server that speaks OpenAI's protocol by a rule of the test's, and misbehaves when told to."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer(ThreadingHTTPServer):
    """answer(request) gives the choice's fields, or a fault.

    faults: what befalls the next requests, in order. None: nothing; bytes: that body; else a status code, "half",
    "not json", "redirect URL", "stall" (no answer), "gone" (it hangs up), "late SECONDS", "twice" (then with other
    words), or "model NAME" (that one answers).
    requests: all that came in, with those that got a fault. answered: those that got a whole answer. keys: the
    Authorization headers; headers: all of each request, {name in lower case: value}.
    """

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults, self.requests, self.answered, self.keys = answer, [], [], [], set()
        self.headers: list[dict] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __exit__(self, *error):
        self.shutdown()  # a loop on a closed socket would never rest
        super().__exit__(*error)

    def handle_error(self, request, client_address):
        """A client that hangs up, as after a time-out, is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_):
        """The tests' output is theirs."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.keys.add(self.headers["Authorization"])
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, bytes):
            self.reply(200, fault)
            return
        answer = self.server.answer(request)
        if isinstance(answer, str):
            fault, answer = answer, {}
        choice = {"index": 0, "finish_reason": "stop", **answer}
        body = {
            "id": "1",
            "object": "completion",
            "created": 1,
            "model": request["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }
        kind, _, value = (fault or "").partition(" ")
        if kind == "model":
            body["model"] = value
        whole = json.dumps(body).encode()
        if kind == "late":
            time.sleep(float(value))
        if kind in ("", "late"):
            self.server.answered.append(request)
            self.reply(200, whole)
        elif kind == "model":
            self.reply(200, whole)
        elif kind == "twice":
            self.server.answered.append(request)
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            other = json.dumps({**body, "choices": [{**choice, "text": "words of another answer"}]}).encode()
            self.wfile.write(head % len(whole) + whole + head % len(other) + other)
        elif fault == "half":
            self.reply(200, whole[: len(whole) // 2], length=len(whole))
            self.close_connection = True
        elif fault == "not json":
            self.reply(200, b"<html>It works!</html>", kind="text/html")
        elif fault.startswith("redirect "):
            self.reply(307, b"", location=fault.removeprefix("redirect "))
        elif fault == "stall":
            time.sleep(1.5)
        elif fault == "gone":
            self.close_connection = True
        else:  # a status code; the key is echoed, as no server should
            message = {"error": {"message": f"no, {self.headers['Authorization']}\nsecond line"}}
            self.reply(int(fault), json.dumps(message).encode(), wait="1" if fault == "429" else None)

    def reply(self, status: int, body: bytes, kind: str = "application/json", length: int | None = None, **more):
        """more: wait, location, of the headers Retry-After and Location."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(body)))
        for name, value in more.items():
            if value:
                self.send_header({"wait": "Retry-After", "location": "Location"}[name], value)
        self.end_headers()
        self.wfile.write(body)


def chat(text: str) -> dict:
    return {"message": {"role": "assistant", "content": text}}


def prefer_longer(request: dict) -> dict:
    """A judge for alpaca_eval's prompts: the longer answer wins, for certain or with 9 to 1."""
    text = request["messages"][-1]["content"]
    first, second = re.findall(r'"(?:answer|output)": """(.*?)"""', text, re.DOTALL)
    best = 0 if len(first) >= len(second) else 1
    if not request.get("logprobs"):
        ranks = [{"model": "model_1", "rank": 1 + best}, {"model": "model_2", "rank": 2 - best}]
        return chat(str(ranks))
    token, other = "mM"[best], "Mm"[best]
    top = [
        {"token": token, "bytes": None, "logprob": -0.105360516},
        {"token": other, "bytes": None, "logprob": -2.302585093},
    ]
    return {**chat(token), "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}
