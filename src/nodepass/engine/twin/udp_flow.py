"""The slow twin's UDP relays: a link whose bytes become datagrams, and the other way round.

Part of `engine`, which describes the whole; nobody else comes here. The UDP side of a relay is
in `gate` for sources and in `udp_dial` for targets.

A relay reads its link only while nothing that came over it waits: whole frames for their turn,
or a datagram for room in the UDP socket. Towards the link it hands over one frame at a time, so
that what the link does not take is never more than one, and a frame is never cut by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from typing import Final, Protocol

from .flow import REASON_ABORTED, REASON_FINISHED, REASON_IDLE, REASON_RESET, Ending, arm_reset
from .legs import Leg, TlsFault, TlsLeg
from .udp_port import Tally

HEADER_BYTES: Final = 2  # of a frame: the length of the datagram behind it
TURN_DATAGRAMS: Final = 64  # per callback, so that one relay does not keep the loop for itself
READ_BYTES: Final = 65536  # of the link at once; the longest frame takes two reads
LAST_READS: Final = 8  # of what nobody wants any more, before a link is closed


class UdpHost(Protocol):
    """What gates and UDP relays need of the engine."""

    loop: asyncio.AbstractEventLoop
    buffer: memoryview
    patience: float
    turns: int

    def bury_relay(self, relay: UdpFlow, ending: Ending) -> None:
        """Take note that a UDP relay has closed its sockets."""


class UdpFlow:
    """A link whose bytes become datagrams; what they go to and come from is the heirs' business.

    Args:
        host: the engine.
        token: its name for this relay.
        leg: the link.
        idle: seconds without a datagram that end it; 0 = never.
        head: what has come over the link before.
    """

    side = 0
    """Number of the link among the two sides."""

    def __init__(self, host: UdpHost, token: int, leg: Leg, idle: float, head: bytes) -> None:
        self.host = host
        self.token = token
        self.leg = leg
        self.idle = idle
        self.tally = Tally()
        self.born = self.active = time.monotonic()
        self.inbox = bytearray(head)
        """What has come over the link and is not sent yet."""
        self.ending: Ending | None = None
        """Why the relay is about to end; what the link has brought goes first."""
        self.is_drained = False
        """Whether the link will bring nothing more."""
        self.is_blocked = False
        """Whether a datagram waits for room in the UDP socket."""
        self.is_over = False
        self._is_begun = False
        self._is_reading = False
        self._is_writing = False
        self._is_due = False
        """Whether `step` is about to be called."""

    @property
    def held(self) -> int:
        """Bytes that wait here."""
        return len(self.inbox) + self.leg.backlog

    @property
    def is_tls(self) -> bool:
        return isinstance(self.leg, TlsLeg)

    # --- for the heirs to fill ---

    def emit(self, data: bytes) -> bool:
        """Send a datagram, or count why not; False: there is no room, ask for `step` then."""
        raise NotImplementedError

    def pass_on(self) -> None:
        """Give the link more: it has taken all it was given."""

    def close(self, ending: Ending) -> None:
        """Leave the UDP side."""

    # --- from the link ---

    def begin(self) -> None:
        """Start; called from the event loop."""
        if self.is_over:
            return
        self._is_begun = True
        self.active = time.monotonic()
        self.watch_link()
        self.step()
        if not self.leg.backlog:
            self.pass_on()

    def read(self) -> None:
        """Take from the link what one read brings."""
        if self.is_over or self.is_drained or not (self._is_reading or self.ending):
            return  # called for what lies inside a TLS link, and too late
        self.host.turns += 1
        try:
            data = self.leg.receive(self.host.buffer[:READ_BYTES])
        except (BlockingIOError, InterruptedError):
            self.is_drained = self.ending is not None
        except OSError as exc:
            self.is_drained = True
            if exc.errno == errno.ENODATA:  # a FIN, without the close_notify of TLS
                self.hear_end()
            else:
                self.break_off(exc)
        else:
            self.inbox += data
            if not data:
                self.is_drained = True
                self.hear_end()
        if self.leg.backlog:
            self.write()  # reading may have made TLS say something
        self.step()

    def hear_end(self) -> None:
        """Take note that the far side has ended its stream."""
        self.ending = self.ending or Ending(REASON_FINISHED)

    def step(self) -> None:
        """Send on what has come over the link, a turn's worth of it; then see what is missing."""
        self._is_due = self.is_blocked = False
        used = 0
        for _ in range(TURN_DATAGRAMS):
            if self.is_over:
                return
            data = self.frame(used)
            if data is None:
                break
            if not self.emit(data):
                self.is_blocked = not self.is_over
                break
            used += HEADER_BYTES + len(data)
        del self.inbox[:used]
        self.settle(self.frame(0) is not None)

    def frame(self, start: int) -> bytes | None:
        """Return the datagram of the frame that starts here, if all of it has come."""
        first = start + HEADER_BYTES
        if len(self.inbox) < first:
            return None
        end = first + int.from_bytes(self.inbox[start:first], "big")
        return bytes(self.inbox[first:end]) if len(self.inbox) >= end else None

    def settle(self, has_more: bool) -> None:
        """Wait for what is missing: room, our next turn, or the link."""
        if self.is_over:
            return
        if self.is_blocked or has_more:
            self.read_on(False)
            if not self.is_blocked:
                self.call_step()
        elif self.is_drained and self.ending:
            self.bury(*self.ending)
        else:
            self.read_on(not self.is_drained)

    def call_step(self) -> None:
        """Go on after whatever else the loop has to do."""
        if not self._is_due:
            self._is_due = True
            self.host.loop.call_soon(self.step)

    def read_on(self, is_wanted: bool) -> None:
        """Watch the link for reading, or stop."""
        if is_wanted and (self.leg.has_more or self.ending):
            self.host.loop.call_soon(self.read)  # no event may tell of it
        if is_wanted != self._is_reading:
            self._is_reading = is_wanted
            if is_wanted:
                self.host.loop.add_reader(self.leg.sock, self.read)
            else:
                self.host.loop.remove_reader(self.leg.sock)

    # --- towards the link ---

    def give(self, data: bytes) -> bool:
        """Give the link bytes, of which it keeps what it cannot send; False: it is broken."""
        try:
            self.leg.send(memoryview(data))
        except OSError as exc:
            self.break_off(exc)
            return False
        self.active = time.monotonic()
        return True

    def write(self) -> None:
        """Send what the link has kept."""
        if self.is_over or self.ending:
            return
        self.host.turns += 1
        try:
            self.leg.flush()
        except OSError as exc:
            self.break_off(exc)
            return
        self.watch_link()
        if not self.leg.backlog:
            self.pass_on()

    def watch_link(self) -> None:
        """Watch for room in the link, if it is room that is wanted."""
        if self.is_over:
            return
        is_wanted = bool(self.leg.backlog) and not self.leg.is_stalled and not self.ending
        if is_wanted != self._is_writing:
            self._is_writing = is_wanted
            if is_wanted:
                self.host.loop.add_writer(self.leg.sock, self.write)
            else:
                self.host.loop.remove_writer(self.leg.sock)

    # --- ends ---

    def break_off(self, exc: OSError) -> None:
        """Take note that the link failed; what came before it is still read and sent."""
        if self.is_over or self.ending:
            return
        if exc.errno == errno.EPIPE:  # the far side had ended before, and is gone now
            self.ending = Ending(REASON_FINISHED)
        else:
            detail = exc.detail if isinstance(exc, TlsFault) else 0
            self.ending = Ending(REASON_RESET, self.side, exc.errno or errno.EIO, detail)
        self.watch_link()
        if self.is_drained:
            self.call_step()
        else:
            self.host.loop.call_soon(self.read)

    def watch_step(self) -> None:
        """Look for what no event tells: the idle limit, and the error of an unread link."""
        if self.is_over or not self._is_begun:
            return
        code = self.leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code and not self.ending:
            self.break_off(OSError(code, ""))
        elif self.leg.pulse.look(self.host.patience):
            self.bury(REASON_RESET, self.side, errno.ETIMEDOUT)
        elif self.idle and time.monotonic() - self.active >= self.idle:
            self.tire()

    def tire(self) -> None:
        """End for the idle limit."""
        self.bury(REASON_IDLE)

    def bury(self, reason: int, side: int = 0, code: int = 0, detail: int = 0) -> None:
        """Close everything, politely if nothing is wrong, and report."""
        if self.is_over:
            return
        self.is_over = True
        sock, loop = self.leg.sock, self.host.loop
        if not loop.is_closed():
            loop.remove_reader(sock)
            loop.remove_writer(sock)
        is_polite = reason in {REASON_FINISHED, REASON_IDLE}
        with contextlib.suppress(OSError):
            if is_polite:
                self.leg.say_end()
                sock.shutdown(socket.SHUT_WR)
                # A socket that is closed with bytes unread sends RST, which may overtake ours.
                for _ in range(LAST_READS):
                    if not sock.recv_into(self.host.buffer):
                        break
            elif reason != REASON_ABORTED:
                self.leg.flush()  # up to our alert
        arm_reset(sock, not is_polite)
        sock.close()
        self.inbox.clear()
        ending = Ending(reason, side, code, detail)
        self.close(ending)
        self.host.bury_relay(self, ending)
