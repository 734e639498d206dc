"""New links of a native session, each from its connect to its claim.

Owns: the connections that are not links yet, and their deadlines. Runs on callbacks: no task and
no timer of its own for a link, since with short visitors as many links are made as there are
visitors. Called by `session`.

    connect ──> greeting ──> [TLS ──>] claim ──> on_end(link)
       └───────────┴───────────┴─────────┴────> on_end(what was wrong)
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections.abc import Callable

from nodepass.config.address import join_address
from nodepass.errors import DialError, NodePassError, PeerWireError, TunnelError
from nodepass.net import resolver, tcp, tcp_dial
from nodepass.net.deadlines import Deadlines
from nodepass.net.readiness import Watch
from nodepass.protocol import strangers
from nodepass.protocol.handshake import ClientHandshake
from nodepass.protocol.proof import LinkKey
from nodepass.tunnel.context import Context
from nodepass.tunnel.idle_links import Link

from .refill import OnEnd
from .server_dialer import READ_SIZE, Agreement, ServerDialer


class _Dial:
    """One connection that is being made, or waits for its greeting."""

    __slots__ = ("handshake", "on_end", "on_ready", "said", "sock")

    def __init__(self, sock: socket.socket, handshake: ClientHandshake, on_end: OnEnd) -> None:
        self.sock = sock
        self.handshake = handshake
        self.on_end = on_end
        self.on_ready: Callable[[], None] | None = None
        """What it is watched with."""
        self.said = b""


class LinkDialer:
    """Every link that one session is making.

    Args:
        dialer: knows how a connection to the server begins.
        agreement: what every link has to fit.
        watch: tells when greetings come.
    """

    def __init__(
        self, context: Context, dialer: ServerDialer, agreement: Agreement, watch: Watch
    ) -> None:
        address = resolver.literal(agreement.host, agreement.port)
        assert address is not None, f"{agreement.host} is no address"
        self._settings = context.settings
        self._counters = context.counters
        self._spawn = context.spawn
        self._dialer = dialer
        self._watch = watch
        self._address = address
        self._key = LinkKey(agreement.key, agreement.session)
        self._tls = agreement.tls
        self._number = 0
        settings = context.settings
        self._dialling = Deadlines[_Dial](settings.dial_timeout, self._on_unanswered)
        self._waiting = Deadlines[_Dial](settings.handshake_timeout, self._on_silence)
        """Those that got no greeting in the time that a connect may take, and are connected."""
        self._open: set[_Dial] = set()
        """Those that wait for a greeting."""
        self._is_closed = False

    def begin(self, on_end: OnEnd) -> None:
        """Make a link.

        Args:
            on_end: called once, maybe before this returns, with the link, or with the
                NodePassError or OSError that was in its way; maybe not at all after `close`.
        """
        family, address = self._address
        try:
            sock = tcp_dial.begin_dial(family, address)
        except OSError as exc:
            on_end(self._error(exc))
            return
        dial = _Dial(sock, self._dialer.new_handshake(), on_end)
        dial.on_ready = functools.partial(self._read, dial)
        self._open.add(dial)
        self._dialling.add(dial)
        try:
            # There is no need to hear that it is connected: the server speaks first.
            self._watch.readable(sock, dial.on_ready)
        except OSError as exc:
            self._fail(dial, self._error(exc))

    def close(self) -> None:
        """Drop what is on its way; idempotent. A TLS handshake ends by itself, without a claim."""
        self._is_closed = True
        for dial in list(self._open):
            self._release(dial)
            tcp.finish(dial.sock)  # it has claimed nothing: nobody's stream
        self._dialling.close()
        self._waiting.close()

    def _read(self, dial: _Dial) -> None:
        greeting = None
        try:
            while greeting is None:  # to the very end: it is told but once what has come
                data = dial.sock.recv(READ_SIZE)
                if not data:
                    raise TunnelError("the other side closed the connection during the handshake")
                dial.said += data
                greeting = dial.handshake.receive_greeting(data)
            if not greeting.is_native or greeting.tls != self._tls:
                raise PeerWireError("the server has changed its dialect or its TLS mode")
        except (BlockingIOError, InterruptedError):
            return
        except NodePassError as exc:
            self._fail(dial, exc)
            return
        except OSError as exc:
            if exc.errno in tcp_dial.BROKEN_LATER:
                why = os.strerror(exc.errno or 0).lower()
                text = f"the connection broke during the handshake: {why}"
                self._fail(dial, TunnelError(text))
            else:
                self._fail(dial, self._error(exc))
            return
        if self._tls:
            self._release(dial)
            self._spawn(self._secure(dial), "making a link")
            return
        self._forget(dial)
        on_ready, dial.on_ready = dial.on_ready, None
        fd = dial.sock.fileno()
        try:
            self._claim(dial)
        finally:
            # Not before: an idle link is watched, too.
            if on_ready is not None:
                self._watch.release(fd, on_ready)

    def _claim(self, dial: _Dial) -> None:
        self._number += 1
        number = self._number
        line = dial.handshake.claim_link(self._key, number)
        try:
            tcp.send_line(dial.sock, line)
        except OSError as exc:
            tcp.reset(dial.sock)
            dial.on_end(exc)
            return
        self._counters.links += 1
        dial.on_end(Link(dial.sock, number, dial.handshake.rest()))

    async def _secure(self, dial: _Dial) -> None:
        sock = dial.sock
        try:
            records = await self._dialer.secure(sock, self._tls, is_native=True)
            if self._is_closed:
                raise TunnelError("it is not wanted any more")
            self._number += 1
            number = self._number
            line = dial.handshake.claim_link(self._key, number, records.binding())
            tcp.send_line(sock, records.seal(line))
        except (NodePassError, OSError) as exc:
            tcp.finish(sock)  # not reset: an alert that says why may be on its way
            dial.on_end(exc)
            return
        except BaseException:
            tcp.reset(sock)
            dial.on_end(TunnelError("its making was cut short"))
            raise
        self._counters.links += 1
        dial.on_end(Link(sock, number, tls=records.connection))

    def _on_unanswered(self, dial: _Dial) -> None:
        if tcp_dial.is_connected(dial.sock):
            self._waiting.add(dial)
        else:
            self._fail(dial, self._error(TimeoutError(errno.ETIMEDOUT, "")))

    def _on_silence(self, dial: _Dial) -> None:
        settings = self._settings
        seconds = settings.dial_timeout + settings.handshake_timeout
        looks = strangers.identify(dial.said)
        self._fail(
            dial, TunnelError(f"no greeting within {seconds:g} s: the other side is {looks}")
        )

    def _error(self, exc: OSError) -> DialError:
        host, port = self._address[1][:2]
        return DialError(join_address(host, port), exc.errno or errno.EIO, 1)

    def _fail(self, dial: _Dial, exc: Exception) -> None:
        self._release(dial)
        tcp.finish(dial.sock)
        dial.on_end(exc)

    def _release(self, dial: _Dial) -> None:
        self._watch.remove(dial.sock)
        dial.on_ready = None  # which holds the dial, as that holds it
        self._forget(dial)

    def _forget(self, dial: _Dial) -> None:
        self._open.discard(dial)
        self._dialling.remove(dial)
        self._waiting.remove(dial)
