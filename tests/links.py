"""A network on one machine: hosts are network namespaces, whose packets cross this process on their way.

Each packet waits for its turn on the sender's line, travels for half a round trip, and waits for its turn on the
receiver's line, as `tc netem delay ... rate ...` would have it (which not every kernel has). A host behind a firewall
opens connections to others, and nobody opens one to it. Needs root, for namespaces and TUN devices, and Linux. Nothing
leaves the namespaces.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU_BYTES = 9000  # large packets: fewer pass through here
_TCP, _SYN, _ACK = 6, 0x02, 0x10
_QUEUE_S = 0.25  # a line that is further behind loses packets, and TCP slows down


class Host:
    """A network namespace with an address."""

    def __init__(self, number: int, *, firewalled: bool):
        self.firewalled = firewalled
        self.refused = 0  # connections that others wanted to open
        self.name = f"pt{os.getpid()}-{number}"
        self.address = f"10.99.0.{number + 1}"
        self.device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)

    def command(self, *command: str | Path) -> list[str | Path]:
        """`command` as it runs on this host."""
        return ["ip", "netns", "exec", self.name, *command]

    def start(self) -> None:
        interface = f"tun-{self.name}"[:15]
        fcntl.ioctl(self.device, _TUNSETIFF, struct.pack("16sH", interface.encode(), _IFF_TUN | _IFF_NO_PI))
        _ip("netns", "add", self.name)
        _ip("link", "set", interface, "netns", self.name)
        _ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", interface)
        _ip("-n", self.name, "link", "set", interface, "mtu", str(_MTU_BYTES), "up")
        _ip("-n", self.name, "link", "set", "lo", "up")

    def lets_in(self, packet: bytes) -> bool:
        """Whether the firewall does, where there is one. `packet` is of IPv4."""
        flags = packet[4 * (packet[0] & 0x0F) + 13] if packet[9] == _TCP else 0
        refused = self.firewalled and flags & (_SYN | _ACK) == _SYN
        self.refused += refused
        return not refused

    def stop(self) -> None:
        os.close(self.device)
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)


@contextmanager
def network(
    hosts: int, *, round_trip_s: float, bits_per_s: float, firewalled: Sequence[int] = ()
) -> Iterator[list[Host]]:
    """Hosts of which each has one line of `bits_per_s` in either direction to all others; some `firewalled`."""
    with ExitStack() as stack:
        found = []
        for number in range(hosts):
            host = Host(number, firewalled=number in firewalled)
            stack.callback(host.stop)
            host.start()
            found.append(host)
        stopping = threading.Event()
        carrier = threading.Thread(target=_carry, args=(found, round_trip_s / 2, bits_per_s / 8, stopping))
        carrier.start()
        stack.callback(carrier.join)
        stack.callback(stopping.set)
        yield found


def _carry(hosts: Sequence[Host], delay_s: float, bytes_per_s: float, stopping: threading.Event) -> None:
    by_address = {bytes(map(int, host.address.split("."))): number for number, host in enumerate(hosts)}
    up_free_s, down_free_s = [0.0] * len(hosts), [0.0] * len(hosts)
    under_way: list[tuple[float, int, int, bytes]] = []  # when it arrives, its number, whose it is, the packet
    count = 0
    poll = select.poll()
    senders = {host.device: number for number, host in enumerate(hosts)}
    for device in senders:
        poll.register(device, select.POLLIN)
    while not stopping.is_set():
        wait_s = under_way[0][0] - time.monotonic() if under_way else 0.1
        for device, _ in poll.poll(max(0.0, min(wait_s, 0.1)) * 1000):
            packet = os.read(device, _MTU_BYTES)
            sender, receiver = senders[device], by_address.get(packet[16:20])
            now_s, turn_s = time.monotonic(), len(packet) / bytes_per_s
            if receiver is None or up_free_s[sender] - now_s > _QUEUE_S or not hosts[receiver].lets_in(packet):
                continue
            up_free_s[sender] = max(now_s, up_free_s[sender]) + turn_s
            down_free_s[receiver] = max(up_free_s[sender] + delay_s, down_free_s[receiver] + turn_s)
            count += 1
            heapq.heappush(under_way, (down_free_s[receiver], count, receiver, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, receiver, packet = heapq.heappop(under_way)
            with suppress(BlockingIOError, OSError):
                os.write(hosts[receiver].device, packet)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
