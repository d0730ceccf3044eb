"""A real browser, headless, for the pages that are made here; it reaches no network."""

import asyncio
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp

PATIENCE = 30
"""Seconds that anything may take."""


class Browser:
    """A real one, headless, spoken to by its DevTools protocol."""

    def __init__(self, address: str) -> None:
        self.address, self.errors, self.number = address, [], 0

    def __enter__(self):
        with ExitStack() as stack:
            profile = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
            process = subprocess.Popen([shutil.which("chromium"), *options], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            # where it writes its port
            found, end = profile / "DevToolsActivePort", time.monotonic() + PATIENCE
            while not (found.exists() and found.read_text().strip()):
                assert process.poll() is None and time.monotonic() < end, "the browser did not start"
                time.sleep(0.05)
            self.loop = asyncio.new_event_loop()
            stack.callback(self.loop.close)
            session = self.loop.run_until_complete(self.connect(found.read_text().split()[0]))
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
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            (tab,) = (one for one in await answer.json() if one["type"] == "page")
        self.socket = await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        return session

    def call(self, method: str, **given):
        self.number += 1
        return self.loop.run_until_complete(self.answer(method, given))

    async def answer(self, method: str, given: dict):
        await self.socket.send_json({"id": self.number, "method": method, "params": given})
        while True:
            found = await self.socket.receive_json(timeout=60)
            if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(found)
            if found.get("id") == self.number:
                return found["result"]

    def run(self, code: str):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, code: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(code):
            assert time.monotonic() < end, code
            time.sleep(0.05)

    def press(self, key: str, number: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=number, text=text if kind == "keyDown" else "")
