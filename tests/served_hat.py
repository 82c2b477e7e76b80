"""A model that is served without Flower's SuperLink, chats with it, and the command line as a process."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from fl_edge.clients.hat import HatWorkload
from fl_edge.clients.hat.chat import Chat, Door
from fl_edge.clients.hat.typed import Unfolding
from fl_edge.hat.adapter import new_adapter, save_adapter
from fl_edge.hat.config import CloudConfig, HatConfig
from fl_edge.hat.split import load_device
from fl_edge.link.resident.config import OPEN, TLS, LinkConfig
from fl_edge.link.resident.open import OpenGrid
from fl_edge.models.vocabulary import decoder_tokenizer
from fl_edge.seeding import torch_rng
from fl_edge.strategies.hat import Hat
from tests.tiny_hat import CPU, load_whole, save_model

NEW, TOKEN = 12, b"a token of tests, long enough"
TEXT = "def schönes_wetter(wann):\n    return '☀️ 🙂 日本'\n"
CLOUD = CloudConfig(capacity=128, cache_tokens=128 * 4, batch_tokens=16)
LINK = LinkConfig(grace_s=1.0, max_message_mib=OPEN.max_message_mib)


class Model:
    """A model on disk with a tokenizer and an adapter, and what the unsplit one says."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = decoder_tokenizer([TEXT], 280)
        self.folder = save_model(folder / "model", vocab_size=len(self.tokenizer))
        self.tokenizer.save_pretrained(self.folder)
        self.whole: Any = load_whole(self.folder)
        self.device = load_device(self.folder, 2, CPU)
        self.adapter = new_adapter(self.device, torch_rng(0, "adapter")).double()
        self.adapter_file = folder / "adapter.safetensors"
        save_adapter(self.adapter, self.device, self.adapter_file)

    def answer(self, prompt: str, new_tokens: int = NEW) -> str:
        tokens = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        stop = self.tokenizer.eos_token_id
        found = self.whole.generate(
            tokens, max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop
        )
        pieces: list[str] = []
        unfolding = Unfolding(self.tokenizer, pieces.append)
        unfolding.add(found[0, tokens.shape[1] :].tolist())
        unfolding.end()
        return unfolding.text

    def work(self, **changes: Any) -> HatWorkload:
        made = HatWorkload(
            device="desk",
            model=self.device,
            adapter=self.adapter,
            prompt=lambda _: None,
            hear=lambda *_: None,
            config=HatConfig(new_tokens=NEW, threshold=0.0, shortest_chunk=4, longest_chunk=8),
            stops=(self.tokenizer.eos_token_id,),
        )
        return replace(made, **changes)


class Served:
    """A server in a thread of this process."""

    def __init__(
        self, model: Model, cloud: CloudConfig = CLOUD, port: int = 0, tls: TLS | None = None, shallow: int = 2
    ) -> None:
        self.grid = OpenGrid(f"127.0.0.1:{port}", tls, TOKEN, LINK)
        self.hat = Hat(model.folder, shallow, cloud, min_devices=0, observers=[lambda *_: None])
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self.hat.start, args=(self.grid, None), kwargs={"until": self._stop.is_set}
        )
        self._thread.start()

    def door(self, **changes: Any) -> Door:
        return replace(Door("127.0.0.1", self.grid.port, TOKEN, b""), **changes)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.grid.close("the server was stopped")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Shown(io.StringIO):
    """What is shown, and something to do when it is."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._then = then

    def write(self, text: str) -> int:
        then, self._then = self._then, None
        if then:
            then()
        return super().write(text)


def converse(
    own: Model, door: Door, typed: Sequence[str | Callable[[], str]], shown: Shown | None = None, **changes: Any
) -> tuple[str, list[str]]:
    """Chat; a callable is called when it would be typed. Returns what was shown, and what else was said."""
    lines, shown, told = iter(typed), shown or Shown(), io.StringIO()

    def read() -> str | None:
        line = next(lines, None)
        return line() if callable(line) else line

    Chat(door, own.work(**changes), own.tokenizer, read, shown, told, LINK, patience_s=5.0).run()
    return shown.getvalue(), told.getvalue().splitlines()


def lines_of(*answers: str) -> str:
    return "".join(answer if answer.endswith("\n") or not answer else f"{answer}\n" for answer in answers)


_PATIENCE_S = 120.0


class Process:
    """The command line in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-u", "-m", "fl_edge.clients.hat", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.child.stdout
        assert self.child.stderr
        self.shown, self.told = bytearray(), bytearray()
        self._threads = [
            threading.Thread(target=self._follow, args=pair)
            for pair in ((self.child.stdout, self.shown), (self.child.stderr, self.told))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _follow(stream: Any, into: bytearray) -> None:
        while data := os.read(stream.fileno(), 65_536):
            into += data

    def says(self, words: str) -> None:
        """Wait until it has said something; a process of a loaded machine may take long to start."""
        deadline = time.monotonic() + _PATIENCE_S
        while words.encode() not in self.told:
            assert self.child.poll() is None, self.told.decode()
            assert time.monotonic() < deadline, self.told.decode()
            time.sleep(0.01)

    def type(self, text: str) -> None:
        assert self.child.stdin
        self.child.stdin.write(text.encode())
        self.child.stdin.flush()

    def interrupt(self) -> tuple[int, str, str]:
        """Press Ctrl-C, and return what :meth:`end` does; the end of input must not come first."""
        self.child.send_signal(signal.SIGINT)
        self.child.wait(60)
        return self.end()

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, what was shown, and what else was said."""
        assert self.child.stdin
        self.child.stdin.close()
        code = self.child.wait(60)
        for thread in self._threads:
            thread.join()
        for stream in (self.child.stdout, self.child.stderr):
            assert stream
            stream.close()
        return code, self.shown.decode(), self.told.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.end()
