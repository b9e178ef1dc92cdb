"""SIGKILL at random moments while samples are extracted: `python -m tests.extract.kills --kills 100`.

A warm parent forks children that extract into one store; each is killed at a random moment and the next goes on.
Batches of one sample make the states independent of where a run was cut: the end can be compared bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.extract.backbones.base import TextOptions
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.extraction import compute
from pipeline.extract.feature_space import SpaceOptions, space_identity
from pipeline.extract.inputs import Inputs
from pipeline.extract.pretrained import Checkpoint
from pipeline.store import Store
from tests import tiny

STATES = ["encoder.1", "encoder.3"]
SEGMENT_BYTES = 6_000  # about ten samples


@dataclass
class Killing:
    """A tiny backbone with inputs, ready to be extracted by forked children."""

    live: LiveBackbone
    inputs: Inputs
    keys: list[str]
    identity: dict[str, Any]

    @classmethod
    def prepare(cls, folder: Path, samples: int) -> Killing:
        checkpoint = Checkpoint(tiny.bert(folder / "bert"), "bert")
        backbone = checkpoint.backbone
        device = torch.device("cpu")
        live = LiveBackbone(backbone, lambda: backbone.load(checkpoint.folder, torch.float32, "eager", device), device)
        inputs = backbone.prepare(checkpoint.tokenizer, [(t,) for t in tiny.sentences(samples)], TextOptions())
        assert live.model is not None
        identity = space_identity(checkpoint, SpaceOptions(format="float32", attention="eager"))
        return cls(live, inputs, inputs.keys(), identity)

    def extract(self, store: Path, log: Path | None = None) -> int:
        """Extract what is missing; every sample that is computed is noted in `log` first. Returns how many."""
        live = self.live
        if log is not None:
            original, descriptor = live.states, os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

            def states(inputs: Inputs, *args: Any, **options: Any) -> Any:
                os.write(descriptor, "".join(f"{k}\n" for k in inputs.keys()).encode())  # noqa: SIM118
                return original(inputs, *args, **options)

            live.states = states  # type: ignore[method-assign]
        space = Store.open(store, create=True).create_space(self.identity)
        report = compute(
            space,
            self.inputs,
            self.keys,
            STATES,
            live,
            tokens=1,
            batch_size=1,
            quiet=True,
            segment_bytes=SEGMENT_BYTES,
        )
        return report.computed

    def fork(self, store: Path, log: Path) -> int:
        """A child that extracts; its process id."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            self.extract(store, log)
            code = 0
        finally:
            os._exit(code)

    def run(self, folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
        """Kill children until `kills` were; whenever a store is complete it is checked and a new one begun.

        Returns what happened. Raises AssertionError for a sealed sample that was lost or computed again, and for a
        final store that differs from the uninterrupted one.
        """
        pick = random.Random(seed)
        began = time.perf_counter()
        self.fork_and_wait(folder / "whole", folder / "whole.log")
        whole = time.perf_counter() - began
        expected = content(folder / "whole")
        done = {"kills": 0, "stores": 0, "after_a_seal": 0, "garbage": 0, "computed": 0}
        while done["kills"] < kills:
            store, log = folder / f"killed{done['stores']}", folder / f"killed{done['stores']}.log"
            finished = False
            while not finished:
                before = stored(store)
                log.unlink(missing_ok=True)
                child = self.fork(store, log)
                if done["kills"] < kills:
                    time.sleep(pick.random() * whole / 3)
                    os.kill(child, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                assert code in (0, -signal.SIGKILL), f"extraction failed with status {code}"
                done["kills"] += code != 0
                finished = code == 0
                computed = set(log.read_text().split()) if log.exists() else set()
                after = stored(store)
                assert before <= after, "a sealed sample was lost"
                assert not computed & before, "a sealed sample was computed again"
                done["after_a_seal"] += bool(after)
                done["computed"] += len(computed)
                segments = store.glob("spaces/*/segments/*")
                done["garbage"] += any(not (s / "manifest.json").exists() for s in segments)
            found = content(store)
            assert found.keys() == expected.keys() and len(found) == len(set(self.keys))
            for key, value in expected.items():
                assert found[key] == value, f"sample {key} differs from the uninterrupted run"
            assert Store.open(store).verify(deep=True) == []
            # A writer killed before it said who it is leaves an empty folder, which is swept when it is an hour old.
            garbage = [s for s in store.glob("spaces/*/segments/*") if not (s / "manifest.json").exists()]
            assert not [f.name for s in garbage for f in s.iterdir() if f.name[0] != "."], "garbage stayed"
            done["stores"] += 1
        return done

    def fork_and_wait(self, store: Path, log: Path) -> None:
        assert os.waitpid(self.fork(store, log), 0)[1] == 0


def stored(store: Path) -> set[str]:
    """Keys that are sealed in `store`."""
    try:
        spaces = Store.open(store).spaces() if (store / "store.json").exists() else []
    except Exception as error:
        raise AssertionError(f"a kill left a store that cannot be opened: {error}") from error
    return {key for space in spaces for key in space.stored()}


def content(store: Path) -> dict[str, tuple[bytes, ...]]:
    """Sample key → the bytes of its states and columns; asserts that each stands there once."""
    out: dict[str, tuple[bytes, ...]] = {}
    (space,) = Store.open(store).spaces()
    for segment in space.segments():
        read = segment.read(STATES, list(segment.columns))
        offsets = read.offsets("encoder")
        for i, key in enumerate(read.keys):
            assert key not in out, f"sample {key} was stored twice"
            rows = slice(offsets[i], offsets[i + 1])
            states = [read.states[s].values[rows].tobytes() for s in STATES]
            out[key] = (*states, *(read.columns[c][rows].tobytes() for c in sorted(read.columns)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        killing = Killing.prepare(Path(folder), options.samples)
        done = killing.run(Path(folder), options.kills, options.seed)
    sys.stdout.write(f"{done}\nevery sealed sample kept, none computed again, final stores equal\n")


if __name__ == "__main__":
    main()
