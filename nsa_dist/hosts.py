"""Several hosts on one Linux machine: network namespaces on a bridge, each with one interface of limited rate.

Needs iproute2 and the right to make namespaces (root, most often).
"""

import ctypes
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nsa_dist.config import ConfigError

INTERFACE = "eth0"  # inside each host


@dataclass(frozen=True)
class Hosts:
    """`names`: the namespaces, one a host."""

    names: list[str]

    def counters(self) -> list[tuple[int, int]]:
        """Bytes that each host's interface has sent and received so far, headers included."""
        return [self._counters(name) for name in self.names]

    def _counters(self, name: str) -> tuple[int, int]:
        found = json.loads(_ip("-n", name, "-s", "-j", "link", "show", INTERFACE))[0]["stats64"]
        return int(found["tx"]["bytes"]), int(found["rx"]["bytes"])


@contextmanager
def hosts(count: int, gbit: float) -> Iterator[Hosts]:
    """`count` hosts of which each sends at most `gbit` Gbit/s (0: no limit). They are gone afterwards.

    Raises ConfigError where this machine or this user can't make them.
    """
    if not shutil.which("ip") or not shutil.which("tc"):
        raise ConfigError(f"--hosts {count}: needs `ip` and `tc` (iproute2), which are not here")
    mark = uuid.uuid4().hex[:6]
    names, bridge = [f"nsa-{mark}-{i}" for i in range(count)], f"nsabr{mark}"
    try:
        # The bridge has a namespace of its own: nothing of this machine's network is touched.
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for i, name in enumerate(names):
            _ip("netns", "add", name)
            peer = ["peer", "name", f"port{i}", "netns", bridge]
            _ip("-n", name, "link", "add", INTERFACE, "type", "veth", *peer)
            _ip("-n", bridge, "link", "set", f"port{i}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", INTERFACE, "up")
            if gbit:
                _limit(name, gbit)
        yield Hosts(names)
    except subprocess.CalledProcessError as error:
        told = error.stderr.strip().splitlines()[-1] if error.stderr.strip() else f"status {error.returncode}"
        raise ConfigError(f"--hosts {count}: this machine doesn't let us make network namespaces ({told})") from None
    finally:
        for name in [*names, bridge]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def enter(name: str) -> None:
    """This process's thread joins a host's network; connections and interfaces are that host's from now on."""
    clone_newnet = 0x40000000  # <sched.h>
    file = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(file, clone_newnet):
            raise OSError(ctypes.get_errno(), f"setns to {name}")
    finally:
        os.close(file)


def _limit(name: str, gbit: float) -> None:
    burst = max(int(gbit * 1e9 / 8 / 250), 128 << 10)  # 4 ms of it
    rate = ["rate", f"{gbit * 1000:.0f}mbit", "burst", str(burst), "latency", "50ms"]
    words = ["tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *rate]
    subprocess.run(words, capture_output=True, text=True, check=True)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
