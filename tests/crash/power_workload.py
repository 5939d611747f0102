"""What is recorded for the power cuts: each scenario logs to a store of its own, and says in `marks` what is durable.

    power_workload.py ROOT PRELUDE SCENARIO...

A mark is one write: "sent TRIAL COUNT" before events are logged, "durable TRIAL COUNT" when a flush was acknowledged,
and "journal PATH" followed by what the file holds, for mapped files, whose pages strace doesn't see.
"""

from __future__ import annotations

import glob
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import eventrun


class Scene:
    """A folder in which a scenario runs, with its marks."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = place / "of" / "a" / "user" / "runs"  # none of which exists
        self.mapped = True
        self.marks = os.open(place / "marks", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def say(self, *words: object) -> None:
        """Make a mark."""
        os.write(self.marks, " ".join(map(str, words)).encode() + b"\n")

    def journals(self) -> None:
        """Tell what the journals hold just now, where they are mapped."""
        if not self.mapped:
            return
        for path in glob.glob(f"{self.store}/journals/*/*.arena"):
            try:
                data = Path(path).read_bytes()
            except OSError:  # given back meanwhile
                continue
            name = Path(path).relative_to(self.place)
            os.write(self.marks, f"journal {name}\n".encode() + zlib.compress(data, 1))

    def open(self) -> eventrun.Client:
        """Open the store."""
        import eventrun

        return eventrun.open(self.store, linger_ms=5, quiet=True)

    def log(
        self, client: eventrun.Client, trials: dict[str, eventrun.Trial], done: int, until: int, pad: int = 0
    ) -> None:
        """Log the numbers from `done` to `until` to each trial, and flush."""
        more = {"pad": "x" * pad} if pad else {}
        for name in trials:
            self.say("sent", name, until)
        for i in range(done, until):
            for trial in trials.values():
                trial.log({"i": i, **more}, step=i)
        self.journals()
        client.flush().result()
        for name in trials:
            self.say("durable", name, until)
        self.journals()


def one_trial(scene: Scene) -> None:
    """One trial, from the creation of the store to a clean close."""
    with scene.open() as client:
        trials = {"a": client.trial("crash", name="a")}
        for done in range(0, 60, 5):
            scene.log(client, trials, done, done + 5)


def many_trials(scene: Scene) -> None:
    """Trials that come and go, with checkpoints and with journals that are given back and used again."""
    _settle_often()
    with scene.open() as client:
        for turn in range(4):
            trials = {f"{turn}{name}": client.trial("crash", name=f"{turn}{name}") for name in "abc"}
            for done in range(0, 60, 20):
                scene.log(client, trials, done, done + 20, pad=400)
            for trial in trials.values():
                trial.finish()


def killed_writer(scene: Scene) -> None:
    """A writer that is killed, another that takes in what it left and goes on."""
    _settle_often()
    child = _in_child(partial(_log_for_ever, scene))
    _wait_for(scene, b"durable k 30\n")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with scene.open() as client:
        client.recovery().result()
        trials = {"b": client.trial("crash", name="b")}
        for done in range(0, 30, 10):
            scene.log(client, trials, done, done + 10, pad=100)


def _log_for_ever(scene: Scene) -> None:
    client = scene.open()
    trials = {"k": client.trial("crash", name="k")}
    done = 0
    while True:
        scene.log(client, trials, done, done + 10, pad=100)
        done += 10


def two_writers(scene: Scene) -> None:
    """Two processes that log at the same time."""
    _settle_often()
    children = [_in_child(partial(_log_one, scene, name)) for name in "ab"]
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


def _log_one(scene: Scene, name: str) -> None:
    with scene.open() as client:
        trials = {name: client.trial("crash", name=name)}
        for done in range(0, 80, 10):
            scene.log(client, trials, done, done + 10, pad=100)


def views(scene: Scene) -> None:
    """Views that are read, and made anew, while a trial logs."""
    _settle_often()
    with scene.open() as client:
        trials = {"v": client.trial("crash", name="v")}
        for done in range(0, 60, 5):
            scene.log(client, trials, done, done + 5, pad=100)
            list(client.trials())
            if done % 20 == 0:
                client.rebuild().result()


def network(scene: Scene) -> None:
    """Two processes that leave fragments on a network disk; reads collect them, between and at the end."""
    from eventrun import filesystems
    from eventrun.journal import segments

    scene.mapped = False
    vars(segments)["WRITTEN_ARENA_BYTES"] = 256 << 10  # or each image would have 128 MiB of holes
    filesystems.MOUNTINFO = scene.place.with_suffix(".mounts")
    filesystems.MOUNTINFO.write_text(mounts(scene.place))
    os.environ["XDG_CACHE_HOME"] = str(scene.place.with_suffix(".cache"))
    children = [_in_child(partial(_log_fragments, scene, name)) for name in "ab"]
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    with scene.open() as client:
        client.recovery().result()


def mounts(network: Path) -> str:
    """Make a mount table by which this folder is on a network disk, and all else on one of our own."""
    return f"1 1 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {network} rw - nfs4 server:/x rw\n"


def _log_fragments(scene: Scene, name: str) -> None:
    with scene.open() as client:
        trials = {name: client.trial("crash", name=name)}
        for done in range(0, 60, 10):
            scene.log(client, trials, done, done + 10, pad=1500)
            if done % 20 == 10:
                client.recovery().result()


LOCAL = (one_trial, many_trials, killed_writer, two_writers, views)
SCENARIOS = {each.__name__: each for each in (*LOCAL, network)}


def _settle_often() -> None:
    import eventrun.recorder
    import eventrun.stores.sqlite

    vars(eventrun.recorder)["SETTLE_BYTES"] = 8 << 10
    vars(eventrun.stores.sqlite)["WAL_BYTES"] = 48 << 10


def _in_child(job: Callable[[], None]) -> int:
    # A fork before any client is open: the modules needn't be imported again, which is slow under strace.
    child = os.fork()
    if not child:
        try:
            job()
        except BaseException:  # noqa: BLE001 - or the child would go on as its parent
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child


def _wait_for(scene: Scene, mark: bytes) -> None:
    while mark not in (scene.place / "marks").read_bytes():
        time.sleep(0.01)


def main() -> None:
    """Run scenarios, each in a process of its own."""
    root, prelude, *names = sys.argv[1:]
    exec(prelude, {"__name__": "prelude"})

    import eventrun.recorder
    import eventrun.stores.sqlite  # noqa: F401 - once, before the forks

    for name in names:
        place = Path(root, name)
        place.mkdir(parents=True)
        scene = Scene(place)
        assert os.waitpid(_in_child(partial(SCENARIOS[name], scene)), 0)[1] == 0, name
        os.close(scene.marks)


if __name__ == "__main__":
    main()
