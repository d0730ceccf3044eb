"""Headless Chromium for tests of the HTML pages, driven over its DevTools protocol."""

import asyncio
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp

PATIENCE = 30
"""Seconds for the browser to start, and for a condition to become true."""
ANSWER = 60
"""Seconds for the answer to a DevTools call."""


class Browser:
    """Chromium with the page at `address`."""

    def __init__(self, address: str) -> None:
        self.address, self.errors, self.calls = address, [], 0

    def __enter__(self):
        with ExitStack() as stack:
            profile = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            options = [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ]
            process = subprocess.Popen([shutil.which("chromium"), *options], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            port_file, end = profile / "DevToolsActivePort", time.monotonic() + PATIENCE
            while not (port_file.exists() and port_file.read_text().strip()):
                assert process.poll() is None and time.monotonic() < end, "the browser did not start"
                time.sleep(0.05)
            self.loop = asyncio.new_event_loop()
            stack.callback(self.loop.close)
            session = self.loop.run_until_complete(self.connect(port_file.read_text().split()[0]))
            stack.callback(lambda: self.loop.run_until_complete(session.close()))
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
            self.call("Page.navigate", url=self.address)
            self.wait("document.readyState === 'complete' && document.getElementById('samples') !== null")
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    async def connect(self, port: str):
        session = aiohttp.ClientSession()
        async with session.get(f"http://127.0.0.1:{port}/json") as response:
            (tab,) = (target for target in await response.json() if target["type"] == "page")
        self.socket = await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        return session

    def call(self, method: str, **parameters):
        """Call a DevTools method and return its result."""
        self.calls += 1
        return self.loop.run_until_complete(self.answer(method, parameters))

    async def answer(self, method: str, parameters: dict):
        await self.socket.send_json({"id": self.calls, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=ANSWER)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(message)
            if message.get("id") == self.calls:
                return message["result"]

    def run(self, code: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, code: str) -> None:
        """Wait until a JavaScript expression in the page is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(code):
            assert time.monotonic() < end, code
            time.sleep(0.05)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key, given by its name and Windows key code; `text` is what it types."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )
