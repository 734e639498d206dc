"""The native engine: joins two sockets and moves bytes between them without Python.

Owns: every descriptor handed to relay() until its completion, the worker threads, and all
memory they use. This file is the control plane, called from one Python thread, and never
blocks except in close(). What the workers do is in fastcopy/*.pxi, included below; they
hold no Python state and never take the GIL. engine/twin/engine.py is the same in plain Python.
"""

import atexit
import errno as _errno
import operator as _operator
import os
import socket as _socket
import time
import warnings
import weakref

from nodepass.engine.types import PLAIN, Completion, EngineStatistics, FlowOptions, Newcomer
from nodepass.engine.types import UdpCompletion, UdpCounts
from nodepass.errors import EngineClosed, EngineError

from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport (
    EADDRNOTAVAIL,
    EAFNOSUPPORT,
    EAGAIN,
    EBADF,
    EBADMSG,
    EBUSY,
    ECONNREFUSED,
    ECONNRESET,
    EINPROGRESS,
    EINTR,
    EINVAL,
    EIO,
    EMSGSIZE,
    ENOBUFS,
    ENODATA,
    ENODEV,
    ENOENT,
    ENOMEM,
    ENOSYS,
    ENOTCONN,
    ENOTSOCK,
    EPERM,
    EPIPE,
    EPROTOTYPE,
    ETIMEDOUT,
    errno,
)
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset, strlen

from nodepass._linux cimport *
from nodepass._libssl cimport *

include "fastcopy/sys.pxi"
include "fastcopy/atomic.pxi"
include "fastcopy/core.pxi"
include "fastcopy/slot.pxi"
include "fastcopy/fd.pxi"
include "fastcopy/buffer.pxi"
include "fastcopy/head.pxi"
include "fastcopy/list.pxi"
include "fastcopy/ring.pxi"
include "fastcopy/cell.pxi"
include "fastcopy/queue.pxi"
include "fastcopy/mmsg.pxi"
include "fastcopy/pipe.pxi"
include "fastcopy/worker.pxi"
include "fastcopy/wheel.pxi"
include "fastcopy/flow.pxi"
include "fastcopy/leg.pxi"
include "fastcopy/tcp_dial.pxi"
include "fastcopy/pulse.pxi"
include "fastcopy/splice.pxi"
include "fastcopy/way.pxi"
include "fastcopy/tls.pxi"
include "fastcopy/handshake.pxi"
include "fastcopy/tally.pxi"
include "fastcopy/udp.pxi"
include "fastcopy/gate.pxi"
include "fastcopy/udp_link.pxi"
include "fastcopy/udp_send.pxi"
include "fastcopy/udp_raw.pxi"
include "fastcopy/submit.pxi"

ABI = 10
REASON_FINISHED = R_FINISHED
REASON_RESET = R_RESET
REASON_ABORTED = R_ABORTED
REASON_IDLE = R_IDLE
REASON_UNMET = R_UNMET

cdef enum:
    MAX_THREADS = 256           # more cores than that have other problems
    MAX_FLOWS = 1 << 24         # slots must fit into 31 bits of event data; 4 GiB of table

cdef object _engines = weakref.WeakSet()
cdef set _lent = set()          # addresses of the SSLs that engines hold
cdef int _forks = 0             # of our ancestors since the module was loaded


def _count_fork():
    global _forks
    _forks += 1


def _close_all():
    for engine in list(_engines):
        engine.close()


os.register_at_fork(after_in_child=_count_fork)
# A net only: whoever makes an engine closes it. Workers hold no Python state, so one that
# is left over harms nobody, but its flows would be cut in mid-air instead of reset.
atexit.register(_close_all)


def _large_pipe_budget(int threads):
    # Half of what the kernel grants this user in all; other programs want pipes, too.
    try:
        with open("/proc/sys/fs/pipe-user-pages-soft") as source:
            pages = int(source.read()) or 1 << 20       # 0: no limit
    except (OSError, ValueError):
        pages = 16384
    return min(MAX_PIPES, pages * os.sysconf("SC_PAGE_SIZE") // 2 // PIPE_BYTES // threads)


cdef bytes _MAPPED = b"\0" * 10 + b"\xff\xff"    # how IPv6 writes IPv4: RFC 4291
cdef object _tls_trouble = None     # not looked yet; then a text, empty if there is none


def tls_trouble():
    """Say what is missing for TLS here; the first call loads OpenSSL.

    Returns:
        None: TLS flows and handshakes work. Otherwise one clause.
    """
    global _tls_trouble
    if _tls_trouble is None:
        _tls_trouble = _find_openssl()
    return _tls_trouble or None


def _find_openssl():
    cdef size_t* pointers = <size_t*>&openssl
    cdef size_t i
    try:
        from nodepass.tls import _openssl

        _openssl.rehearse()
        addresses = _openssl.table()
    except ImportError as exc:          # among them _openssl.Moved
        return str(exc)
    if len(addresses) < sizeof(OpenSsl) // sizeof(size_t):
        return "the native engine was built for a longer table of OpenSSL's functions"
    for i in range(sizeof(OpenSsl) // sizeof(size_t)):
        pointers[i] = addresses[i]
    return ""


def alpn_selector():
    """Return the address of a C function that chooses a server's ALPN protocol.

    Returns:
        What SSL_CTX_set_alpn_select_cb(3) wants. It chooses b"nodepass/2"; a client that does
        not offer it gets an alert.
    """
    return <size_t>&handshake_select_alpn


cdef int _take_handles(str operation, object connection, Handles* handles) except -1:
    if tls_trouble() is not None:
        raise EngineError(operation, _errno.EOPNOTSUPP)
    from nodepass.tls import _openssl

    try:
        ssl, bio_in, bio_out = _openssl.handles(connection)
    except (_openssl.Moved, TypeError) as exc:
        raise EngineError(operation, _errno.EOPNOTSUPP) from exc
    handles.ssl = <void*><size_t>ssl
    handles.bio_in = <void*><size_t>bio_in
    handles.bio_out = <void*><size_t>bio_out
    return 0


# How arguments come in. To convert one may run Python code of the caller's: __index__,
# __float__, __bool__. It may call this very engine, close it, and answer something else the next
# time. Hence the law of every method: each argument is converted once, before anything is
# looked at; Engine.recheck() comes behind that, and from there to the end no Python code runs.


# An integer within limits. For the constructor, which is called once: any size gets an answer.
cdef int64_t _take_whole(object value, str name, int64_t most) except -1:
    number = _operator.index(value)
    if not 1 <= number <= most:
        raise ValueError(f"{name}: {number} is not within 1..{most}")
    return number


# A descriptor or a size. Without this a float would do, too.
cdef int _take_int(object value) except? -1:
    number = value if type(value) is int else _operator.index(value)
    return number


# A token, 0 if it can be none of ours.
cdef uint64_t _take_token(object value) except? 0:
    number = value if type(value) is int else _operator.index(value)
    return number if 0 < number < 1 << 63 else 0


cdef int _check_seconds(double seconds, str name) except -1:
    if not 0.0 <= seconds <= 4e6:               # milliseconds must fit into 32 bits
        raise ValueError(f"{name}: {seconds} is not within 0..4000000 seconds")
    return 0


cdef inline uint32_t _milliseconds(double seconds):
    return <uint32_t>(seconds * 1000 + 0.999)


# Host and port; for IPv6 also flow label and scope, where they are given.
cdef int _take_address(object address, sockaddr_in6* goal) except -1:
    cdef bytes host
    cdef const char* text
    name, port, label, scope = (*address, 0, 0) if len(address) == 2 else address
    if not isinstance(name, str):
        raise TypeError(f"address: a host is text, not {type(name).__name__}")
    port, label, scope = [_operator.index(number) for number in (port, label, scope)]
    if not 0 <= port <= 65535:
        raise ValueError(f"address: port {port} is not within 0..65535")
    if not 0 <= label < 1 << 20:
        raise ValueError(f"address: flow label {label} is not within 0..1048575")
    if not 0 <= scope < 1 << 32:
        raise ValueError(f"address: scope {scope} is not within 0..4294967295")
    host = str.encode(name, "ascii", "replace")
    text = host
    memset(goal, 0, sizeof(sockaddr_in6))
    if strlen(text) != <size_t>len(host):
        goal.sin6_family = 0
    elif inet_pton(AF_INET, text, &(<sockaddr_in*>goal).sin_addr) == 1:
        goal.sin6_family = AF_INET
    elif inet_pton(AF_INET6, text, &goal.sin6_addr) == 1:
        goal.sin6_family = AF_INET6
        goal.sin6_flowinfo = htonl(<uint32_t>label)
        goal.sin6_scope_id = <uint32_t>scope
    if not goal.sin6_family:
        raise ValueError(f"address: {name!r} is no address")
    goal.sin6_port = htons(<uint16_t>port)      # at the same place in an IPv4 address
    return 0


cdef struct Options:
    uint32_t idle_ms
    uint32_t timeout_ms
    int datagram
    bint raw
    bint gso


cdef object _known = None        # the last options that were plain; most flows have the same
cdef Options _known_as


# FlowOptions, each field checked and as the workers want it.
cdef int _take_options(object options, Options* into) except -1:
    global _known, _known_as
    cdef double idle
    cdef double timeout
    if options is _known:
        into[0] = _known_as
        return 0
    if type(options) is not FlowOptions:
        raise TypeError(f"options are FlowOptions, not {type(options).__name__}")
    idle = options[0]
    _check_seconds(idle, "idle")
    timeout = options[1]
    _check_seconds(timeout, "timeout")
    into.idle_ms = _milliseconds(idle)
    into.timeout_ms = _milliseconds(timeout)
    into.datagram = _take_int(options[2])
    if not 1 <= into.datagram <= MAX_DATAGRAM:
        raise ValueError(f"datagram: {into.datagram} is not within 1..{MAX_DATAGRAM}")
    into.raw = options[3]
    into.gso = options[4]
    if all([type(value) in (int, float, bool) for value in options]):
        _known_as = into[0]
        _known = options
    return 0


cdef object _counts(Udp* udp):
    cdef int i
    return UdpCounts(*[load_relaxed64(&udp.tally[i]) for i in range(TALLIES)])


cdef object _newcomer(Core* core, uint32_t slot):
    cdef Udp* udp = &core.udps[slot]
    cdef bytes source = (<const char*>&udp.key.source[0])[:16]
    cdef Flow* gate = &core.flows[udp.gate]
    port = int.from_bytes((<const char*>&udp.key.port)[:2], "big")
    if source.startswith(_MAPPED):
        host = _socket.inet_ntop(_socket.AF_INET, source[12:])
    else:
        host = _socket.inet_ntop(_socket.AF_INET6, source)
        if udp.key.scope:
            host = f"{host}%{udp.key.scope}"
    return Newcomer(flow_token(&core.flows[slot], slot), flow_token(gate, udp.gate), host, port)


cdef class Engine:
    """Native threads that join pairs of sockets and move bytes between them.

    Args:
        threads: worker threads, 1..256.
        flows: how many pairs may be open at once; memory is used only for those that are.
        splice: let the kernel move bulk data without copying it through user space.
        patience: seconds, 1..4000000, of silence after which the far end of a connection counts
            as gone if it leaves something unanswered; see doubt().

    Raises:
        ValueError: an argument is out of range.
        EngineError: no descriptors, threads or memory.
    """

    cdef Core* core
    cdef int pid
    cdef int forks
    cdef bint is_closed
    # Connections by token, from relay() or handshake() to poll(). While workers may use one
    # of them this dictionary must not die, whatever happens to the Engine: `pinned` is one
    # more reference to it, which is given back only when every thread has been joined.
    cdef dict connections
    cdef PyObject* pinned
    cdef uint32_t tls_in_use
    cdef uint32_t closers       # threads that wait within close()
    cdef dict gates             # slots of the gates that are not polled yet
    cdef object __weakref__

    def __cinit__(self):
        self.core = NULL
        self.pid = -1
        self.forks = 0
        self.is_closed = True
        self.connections = {}
        self.gates = {}
        self.pinned = NULL
        self.tls_in_use = 0
        self.closers = 0

    def __init__(self, threads=1, *, flows=65536, splice=True, patience=50.0):
        cdef int rc
        cdef uint32_t i
        cdef uint32_t crew = <uint32_t>_take_whole(threads, "threads", MAX_THREADS)
        cdef uint32_t limit = <uint32_t>_take_whole(flows, "flows", MAX_FLOWS)
        cdef bint use_splice = splice
        cdef double seconds = patience
        cdef uint32_t large_pipes = _large_pipe_budget(crew)
        cdef bint can_forget = os.sysconf("SC_PAGE_SIZE") <= CELL_BYTES
        if not 1.0 <= seconds <= 4e6:
            raise ValueError(f"patience: {seconds} is not within 1..4000000 seconds")
        if self.core != NULL:
            raise EngineError("init", _errno.EALREADY)
        rc = core_open(crew, limit, &self.core)
        if rc < 0:
            raise EngineError("memory", -rc)
        self.pid = getpid()
        self.forks = _forks
        self.core.use_splice = use_splice
        self.core.patience_ms = _milliseconds(seconds)
        self.core.large_pipes = large_pipes
        self.core.can_forget_cells = can_forget
        self.core.notify = sys_eventfd()
        self.core.done = sys_eventfd()
        rc = min(self.core.notify, self.core.done, 0)
        if rc == 0:
            for i in range(self.core.threads):
                rc = worker_start(&self.core.workers[i])
                if rc < 0:
                    break
        if rc < 0:
            self.is_closed = False
            self.close()
            raise EngineError("start", -rc)
        self.is_closed = False
        _engines.add(self)

    def __dealloc__(self):
        cdef uint32_t i
        cdef bint is_joined = True
        if self.core == NULL:
            return
        if self.is_inherited():
            core_unmap(self.core)       # the fds, the threads and the SSLs are the parent's
            return
        if not self.is_closed:
            # Threads may be running: tell them to go and let the last one free the tables.
            for i in range(self.core.crew):
                worker_stop(&self.core.workers[i])
        for i in range(self.core.crew):
            if self.core.workers[i].is_started and not self.core.workers[i].is_joined:
                pthread_detach(self.core.workers[i].thread)
                is_joined = False
        if is_joined:
            for i in range(self.core.fresh):
                if self.core.flows[i].kind == KIND_DIALLED:
                    self.drop_fresh(exchange32(&self.core.udps[i].fresh, 0))
        if self.pinned != NULL and is_joined:
            # What a thread may still use stays lent for ever, and alive.
            for i in range(self.core.fresh):
                self.give_back(&self.core.flows[i])
        core_release(self.core)
        if self.pinned != NULL and is_joined:
            Py_DECREF(<object>self.pinned)
        if not self.is_closed:
            warnings.warn("an Engine was dropped without close()", ResourceWarning)

    def __repr__(self):
        if self.core == NULL or self.is_closed:
            return "<Engine closed>"
        return f"<Engine threads={self.core.threads} flows={self.core.open_count}>"

    # The pid alone may come again in a grandchild, and a fork by native code alone is not
    # counted: either one tells that the threads and descriptors are an ancestor's.
    cdef bint is_inherited(self):
        return self.pid != getpid() or self.forks != _forks

    cdef int check(self, str operation) except -1:
        if self.is_inherited() or self.core == NULL:
            raise EngineClosed(operation, _errno.ECHILD)
        if self.is_closed:
            raise EngineClosed(operation, _errno.ESHUTDOWN)
        return 0

    # Once more, when the caller's code may have run: it cannot have left the process uncounted.
    cdef int recheck(self, str operation) except -1:
        if self.forks != _forks:
            raise EngineClosed(operation, _errno.ECHILD)
        if self.is_closed:
            raise EngineClosed(operation, _errno.ESHUTDOWN)
        return 0

    def fileno(self):
        """Return the descriptor that is readable while completions wait.

        Returns:
            An eventfd for the event loop to watch; it stays the engine's.

        Raises:
            EngineClosed: after close(), or in a forked child.
        """
        self.check("fileno")
        return self.core.notify

    def relay(
        self, fd_a, fd_b, *, tls_a=None, tls_b=None, head_a=b"", head_b=b"", options=PLAIN
    ):
        """Join two connected non-blocking stream sockets.

        Args:
            fd_a: descriptor of one side.
            fd_b: descriptor of the other side.
            tls_a: OpenSSL.SSL.Connection on memory BIOs, its handshake done, if a speaks TLS;
                what it has read already comes first.
            tls_b: the same for b.
            head_a: plaintext already read from a; it reaches b before anything else.
            head_b: plaintext already read from b; it reaches a before anything else.
            options: `idle` counts.

        Returns:
            A token, > 0. Both descriptors and Connections are the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns everything. EOPNOTSUPP: see
                tls_trouble().
            EngineClosed: after close(), or in a forked child.
            ValueError: an option is out of range.

        After: one Completion with this token comes out of poll().
        """
        cdef Options wishes
        self.check("relay")
        _take_options(options, &wishes)
        return self.pair(
            "relay", NULL, _take_int(fd_a), _take_int(fd_b), tls_a, tls_b, head_a, head_b, &wishes
        )

    def dial(self, fd, target, address, *, tls=None, head=b"", options=PLAIN):
        """Connect a socket, and join a connected one with it.

        Args:
            fd: descriptor of side a, a connected non-blocking stream socket.
            target: descriptor of side b, a non-blocking stream socket that is not connected.
            address: where b is to be connected: host and port, for IPv6 also flow label and
                scope. The host is an address. None: its connect has begun already.
            tls: of a, see relay().
            head: plaintext already read from a; it reaches b before anything else.
            options: `timeout` counts, and `idle` for the relay that it becomes.

        Returns:
            A token, > 0. Both descriptors and the Connection are the engine's from now on.

        Raises:
            EngineError: refused; see relay().
            EngineClosed: after close(), or in a forked child.
            ValueError: the address is none, or an option is out of range.

        After: one Completion with this token comes out of poll(). Where no connection came about
            it has REASON_UNMET, side 2 and the errno, ETIMEDOUT when the time was over; or side 1,
            if a has died meanwhile. Side a is reset. Once b is connected all is as with relay().
        """
        cdef Options wishes
        cdef sockaddr_in6 goal
        self.check("dial")
        _take_options(options, &wishes)
        memset(&goal, 0, sizeof(goal))
        if address is not None:
            _take_address(address, &goal)
        return self.pair(
            "dial", &goal, _take_int(fd), _take_int(target), tls, None, head, b"",
            &wishes,
        )

    # Make and submit a flow between two streams; the second is dialled if there is a goal.
    cdef object pair(
        self, str operation, sockaddr_in6* goal, int a, int b, object tls_a, object tls_b,
        bytes head_a, bytes head_b, Options* wishes
    ):
        cdef const char* up = head_a
        cdef const char* down = head_b
        cdef int rc
        cdef uint32_t slot
        cdef Flow* flow
        cdef Worker* w
        cdef Handles handles[2]
        cdef tuple connections = tuple([tls for tls in (tls_a, tls_b) if tls is not None])
        memset(handles, 0, sizeof(handles))
        if tls_a is not None:
            _take_handles(operation, tls_a, &handles[0])
        if tls_b is not None:
            _take_handles(operation, tls_b, &handles[1])
        self.recheck(operation)
        rc = self.look_at(a, SOCK_STREAM, handles[0].ssl)
        if rc == 0:
            rc = self.look_at(b, SOCK_STREAM, handles[1].ssl)
        if rc == 0 and (a == b or (tls_a is not None and handles[0].ssl == handles[1].ssl)):
            rc = -EINVAL
        slot = self.take_slot(operation, rc)
        flow = &self.core.flows[slot]
        w = worker_choose(self.core)
        submit_prepare(flow, a, b, w.index, wishes.idle_ms if goal == NULL else wishes.timeout_ms)
        if goal != NULL:
            flow.is_dialling = 1
            flow.goal = goal[0]
            flow.later_idle_ms = wishes.idle_ms
        if tls_a is not None:
            submit_secure(flow, 0, &handles[0])
        if tls_b is not None:
            submit_secure(flow, 1, &handles[1])
        rc = submit_park_head(flow, 0, up, len(head_a))
        if rc == 0:
            rc = submit_park_head(flow, 1, down, len(head_b))
        if rc < 0:
            submit_undo(flow)
            slot_give(self.core, slot)
            raise EngineError(operation, -rc)
        self.core.total += 1
        return self.submit(w, flow, slot, connections)

    def handshake(self, fd, tls):
        """Drive a TLS handshake on a connected non-blocking stream socket.

        Args:
            fd: descriptor; lent, never closed here.
            tls: OpenSSL.SSL.Connection on memory BIOs, set to accept or to connect, whose
                context has no Python callbacks; bytes may already lie in it.

        Returns:
            A token, > 0. Nobody else touches either until its completion was polled; then
            both are the caller's again.

        Raises:
            EngineError: refused; see relay().
            EngineClosed: after close(), or in a forked child.

        After: one Completion with this token comes out of poll(), with REASON_FINISHED when
            the handshake is done and every byte of it sent; bytes that came behind it may lie
            inside `tls`. There is no deadline: abort() it. REASON_RESET has side 1 and as code
            EBADMSG (TLS failed; our alert has been sent), ENODATA (the peer closed), or the
            errno of the socket.
        """
        cdef int descriptor
        cdef int rc
        cdef uint32_t slot
        cdef Flow* flow
        cdef Worker* w
        cdef Handles handles
        cdef tuple connections = (tls,)
        self.check("handshake")
        descriptor = _take_int(fd)
        _take_handles("handshake", tls, &handles)
        self.recheck("handshake")
        rc = self.look_at(descriptor, SOCK_STREAM, handles.ssl)
        w = &self.core.workers[self.core.threads]
        if rc == 0 and not w.is_started:
            rc = worker_start(w)
        if rc < 0:
            raise EngineError("handshake", -rc)
        slot = slot_take(self.core, 0)
        if slot == NONE_SLOT:
            self.core.refused += 1
            raise EngineError("handshake", _errno.ENOBUFS)
        flow = &self.core.flows[slot]
        submit_prepare(flow, descriptor, -1, w.index, 0)
        submit_secure(flow, 0, &handles)
        flow.kind = KIND_HANDSHAKE
        self.core.handshakes += 1
        return self.submit(w, flow, slot, connections)

    # Hand a flow over, and keep what its worker uses alive.
    cdef object submit(self, Worker* w, Flow* flow, uint32_t slot, tuple connections):
        cdef object token = flow_token(flow, slot)
        cdef int leg
        if connections:
            self.connections[token] = connections
            for leg in range(2):
                if flow.legs[leg].tls != NULL:
                    _lent.add(<size_t>flow.legs[leg].tls)
            self.tls_in_use += <uint32_t>len(connections)
            if self.pinned == NULL:
                Py_INCREF(self.connections)
                self.pinned = <PyObject*>self.connections
        w.load += 1
        fd_mark(self.core, flow.legs[0].fd, 1)
        fd_mark(self.core, flow.legs[1].fd, 1)
        submit_order(w, flow, slot, ORDER_ADMIT)
        return token

    # -> 0 a descriptor and the TLS on it can be taken, -errno otherwise.
    cdef int look_at(self, int fd, int kind, void* ssl):
        cdef int rc = sys_check_socket(fd, kind)
        if rc == 0 and fd_is_taken(self.core, fd):
            rc = -EBUSY
        if rc == 0 and ssl != NULL and <size_t>ssl in _lent:
            rc = -EBUSY
        return rc

    cdef int give_back(self, Flow* flow) except -1:
        cdef int leg
        for leg in range(2):
            if flow.legs[leg].tls != NULL:
                _lent.discard(<size_t>flow.legs[leg].tls)
                flow.legs[leg].tls = NULL
        return 0

    def udp_serve(self, fd, *, waiting=512, options=PLAIN):
        """Open a gate: receive on a bound non-blocking UDP socket.

        Args:
            fd: descriptor; its buffer sizes are the caller's business.
            waiting: how many sources may wait for a link at once, 1..4096.
            options: `datagram` and `gso` count.

        Returns:
            A token, > 0. The descriptor is the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns the descriptor.
            EngineClosed: after close(), or in a forked child.
            ValueError: an option is out of range.

        After: a Newcomer for each source not known yet comes out of poll(). abort() closes the
            gate with all its peers and relays; one UdpCompletion follows for each.
        """
        cdef int descriptor
        cdef int most
        cdef Options wishes
        cdef uint64_t seed = int.from_bytes(os.urandom(8), "little")
        cdef int rc
        cdef uint32_t slot
        cdef Flow* flow
        cdef Udp* udp
        self.check("udp_serve")
        descriptor = _take_int(fd)
        most = _take_int(waiting)
        _take_options(options, &wishes)
        if not 1 <= most <= MAX_WAITING:
            raise ValueError(f"waiting: {most} is not within 1..{MAX_WAITING}")
        self.recheck("udp_serve")
        rc = self.look_at(descriptor, SOCK_DGRAM, NULL)
        slot = self.take_slot("udp_serve", rc)
        flow = &self.core.flows[slot]
        udp = &self.core.udps[slot]
        submit_prepare(flow, descriptor, -1, worker_choose(self.core).index, 0)
        flow.kind = KIND_GATE
        submit_prepare_udp(udp, wishes.datagram)
        rc = gate_make(udp, seed)
        if rc == 0:
            rc = submit_set_up_gate(descriptor, udp.own)
        if rc < 0:
            gate_free(udp)
            submit_undo(flow)
            slot_give(self.core, slot)
            raise EngineError("udp_serve", -rc)
        submit_set_up_udp(descriptor)
        udp.own.gso = wishes.gso and submit_has_gso(descriptor)
        udp.own.waiting = <uint32_t>most
        self.core.gates += 1
        token = self.submit(&self.core.workers[flow.worker], flow, slot, ())
        self.gates[slot] = True
        self.lend()
        return token

    def udp_shut(self, gate):
        """Let no more sources in; those that a gate knows go on. Unknown tokens are left alone.

        Args:
            gate: what udp_serve() returned.

        Raises:
            EngineClosed: after close(), or in a forked child.
        """
        self.wish(_take_token(gate), KIND_GATE, WISH_SHUT)

    def udp_relieve(self, gate):
        """End some short exchanges that are over by all appearance, to make room for others.

        Args:
            gate: what udp_serve() returned; unknown tokens are left alone.

        Raises:
            EngineClosed: after close(), or in a forked child.

        After: some have been looked at, by turns, and end with REASON_IDLE: those that have
            been silent for 30 s; of those with one answer, or whose datagrams all came
            within 2 s, also those silent for 1 s since an answer, or for 5 s without one.
        """
        self.wish(_take_token(gate), KIND_GATE, WISH_RELIEVE)

    def udp_bind(self, peer, fd, *, tls=None, head=b"", options=PLAIN):
        """Carry the datagrams of a waiting peer over a link, in frames of docs/protocol.md.

        Args:
            peer: token of its Newcomer.
            fd: descriptor of the link, a connected non-blocking stream socket.
            tls: see relay().
            head: plaintext already read from the link, at most 262144 bytes.
            options: `idle` and `raw` count. Raw: only the oldest waiting datagram goes over the
                link; what comes back until its end, or until `idle` is over, is the one answer.
                If more are waiting, the same Newcomer comes again.

        Returns:
            A token, > 0. The descriptor and the Connection are the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns everything. ENOENT: nobody waits by
                that token.
            EngineClosed: after close(), or in a forked child.
            ValueError: an option is out of range.

        After: a UdpCompletion with this token comes out of poll(); another one with the peer's,
            as soon as it waits no more.
        """
        cdef Options wishes
        self.check("udp_bind")
        _take_options(options, &wishes)
        wishes.datagram = 0                     # the gate's counts
        return self.carry(
            "udp_bind", KIND_BOUND, _take_token(peer), _take_int(fd), -1, tls, head, &wishes
        )

    def udp_dial(self, fd, target, *, tls=None, head=b"", options=PLAIN):
        """Carry the frames of a link as datagrams of a connected UDP socket, and back.

        Args:
            fd: descriptor of the link, a connected non-blocking stream socket.
            target: descriptor of a connected non-blocking UDP socket.
            tls: see relay().
            head: plaintext already read from the link, at most 262144 bytes.
            options: all but `timeout` count. Raw: what comes over the link is one datagram; the
                first answer of the target goes back, and the link is closed behind it.

        Returns:
            A token, > 0. Both descriptors and the Connection are the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns everything.
            EngineClosed: after close(), or in a forked child.
            ValueError: an option is out of range.

        After: one UdpCompletion with this token comes out of poll(). A target that refuses
            everything for 2 s ends it with REASON_RESET, side 2, ECONNREFUSED.
        """
        cdef Options wishes
        self.check("udp_dial")
        _take_options(options, &wishes)
        return self.carry(
            "udp_dial", KIND_DIALLED, 0, _take_int(fd), _take_int(target), tls, head, &wishes
        )

    # Make and submit a UDP relay; `name` is the token of the peer that a bound relay takes over.
    cdef object carry(
        self, str operation, int kind, uint64_t name, int link, int target, object tls,
        bytes head, Options* wishes
    ):
        cdef Handles handles
        cdef uint32_t slot
        cdef Flow* flow
        cdef Flow* peer = NULL
        cdef Udp* udp
        cdef Worker* w
        cdef int side = 0 if kind == KIND_DIALLED else 1
        cdef int rc
        cdef const char* first = head
        cdef tuple connections = () if tls is None else (tls,)
        memset(&handles, 0, sizeof(handles))
        if tls is not None:
            _take_handles(operation, tls, &handles)
        self.recheck(operation)
        rc = self.look_at(link, SOCK_STREAM, handles.ssl)
        if kind == KIND_BOUND:
            peer = self.find(name)
            if peer == NULL or peer.kind != KIND_PEER:
                rc = -ENOENT
        elif rc == 0:
            rc = self.look_at(target, SOCK_DGRAM, NULL)
        if rc == 0 and len(head) > UDP_READ_BYTES:
            rc = -EMSGSIZE
        slot = self.take_slot(operation, rc)
        flow = &self.core.flows[slot]
        udp = &self.core.udps[slot]
        w = worker_choose(self.core) if peer == NULL else &self.core.workers[peer.worker]
        submit_prepare(flow, link if side == 0 else -1, link if side == 1 else target, w.index,
                       wishes.idle_ms)
        flow.kind = <uint8_t>kind
        submit_prepare_udp(udp, wishes.datagram)
        udp.is_raw = wishes.raw
        udp.raw_ms = flow.idle_ms
        if tls is not None:
            submit_secure(flow, side, &handles)
        rc = submit_park_head(flow, side, first, len(head))
        if rc < 0:
            submit_undo(flow)
            slot_give(self.core, slot)
            raise EngineError(operation, -rc)
        if peer != NULL:
            udp.peer = flow_token(peer, <uint32_t>(peer - self.core.flows))
            udp.gate = self.core.udps[peer - self.core.flows].gate
        else:
            submit_set_up_udp(target)
            udp.gso = wishes.gso and submit_has_gso(target)
        return self.submit(w, flow, slot, connections)

    # A free slot, or the error that there is none, or that a descriptor will not do.
    cdef uint32_t take_slot(self, str operation, int rc) except? 0xFFFFFFFF:
        cdef uint32_t slot
        if rc < 0:
            raise EngineError(operation, -rc)
        slot = slot_take(self.core, 0)
        if slot == NONE_SLOT:
            self.core.refused += 1
            raise EngineError(operation, _errno.ENOBUFS)
        return slot

    # Give every gate as much room for peers as it was promised, if there are slots.
    cdef int lend(self) except -1:
        cdef uint32_t slot
        for slot in self.gates:
            if load_acquire32(&self.core.flows[slot].state) > FLOW_OPEN:
                continue                # it has ended; its completion comes next
            while self.core.udps[slot].own.lent < self.core.udps[slot].own.waiting:
                if not submit_lend_peer(self.core, slot):
                    return 0
        return 0

    def udp_limit(self, token, idle):
        """Change the idle limit of a UDP relay; unknown tokens are left alone.

        Args:
            token: what udp_bind() or udp_dial() returned.
            idle: seconds; 0 = never.

        Raises:
            EngineClosed: after close(), or in a forked child.
            ValueError: the idle limit is out of range.
        """
        cdef double seconds
        cdef uint64_t name
        cdef Flow* flow
        self.check("udp_limit")
        seconds = idle
        _check_seconds(seconds, "idle")
        name = _take_token(token)
        self.recheck("udp_limit")
        flow = self.find(name)
        if flow != NULL and flow_is_udp_relay(flow):
            store_relaxed32(&self.core.udps[flow - self.core.flows].wished_ms,
                            _milliseconds(seconds))
            self.wish(name, flow.kind, WISH_LIMIT)

    def udp_retarget(self, token, target):
        """Go on with another UDP socket towards the target of a dialled relay.

        Args:
            token: what udp_dial() returned.
            target: descriptor of a connected non-blocking UDP socket.

        Returns:
            True: the descriptor is the engine's from now on, and the one before is closed soon.
            False: the relay is over, raw or no dialled one; the caller still owns it.

        Raises:
            EngineError: refused; the caller still owns it.
            EngineClosed: after close(), or in a forked child.

        After: datagrams that wait leave by the new socket; answers that the old one has and
            nobody has read are lost.
        """
        cdef uint64_t name
        cdef int fd
        cdef int rc
        cdef uint32_t old
        cdef uint32_t slot
        cdef Flow* flow
        self.check("udp_retarget")
        name = _take_token(token)
        fd = _take_int(target)
        self.recheck("udp_retarget")
        rc = self.look_at(fd, SOCK_DGRAM, NULL)
        if rc < 0:
            raise EngineError("udp_retarget", -rc)
        flow = self.find(name)
        if flow == NULL or flow.kind != KIND_DIALLED or load_acquire32(&flow.state) > FLOW_OPEN:
            return False
        slot = <uint32_t>(flow - self.core.flows)
        if self.core.udps[slot].is_raw:
            return False
        submit_set_up_udp(fd)
        fd_mark(self.core, fd, 1)
        old = exchange32(&self.core.udps[slot].fresh, <uint32_t>fd + 1)
        self.drop_fresh(old)
        self.wish(name, KIND_DIALLED, WISH_TARGET)
        return True

    # A socket that was handed over and that no worker has taken: it came too late, or another one
    # came behind it.
    cdef void drop_fresh(self, uint32_t fresh) noexcept:
        if fresh:
            fd_mark(self.core, <int>fresh - 1, 0)
            sys_close(<int>fresh - 1)

    def udp_counts(self, token):
        """Return the running counts of a gate or a UDP relay.

        Args:
            token: what udp_serve(), udp_bind() or udp_dial() returned.

        Returns:
            None once its completion was polled.
        """
        cdef Flow* flow = self.find(_take_token(token))
        if flow == NULL or not flow_is_udp(flow):
            return None
        return _counts(&self.core.udps[flow - self.core.flows])

    cdef int wish(self, uint64_t name, int kind, uint32_t bit) except -1:
        cdef Flow* flow
        cdef uint32_t slot
        self.check("udp")           # the token has been converted
        flow = self.find(name)
        if flow != NULL and flow.kind == kind:
            slot = <uint32_t>(flow - self.core.flows)
            submit_wish(&self.core.workers[flow.worker], flow, &self.core.udps[slot], slot, bit)
        return 0

    def live(self, token):
        """Return the running byte counts of a flow.

        Args:
            token: what relay() or handshake() returned.

        Returns:
            (up, down): bytes of plaintext delivered a to b and b to a; None once its
            completion was polled.
        """
        cdef Flow* flow = self.find(_take_token(token))
        if flow == NULL:
            return None
        return load_relaxed64(&flow.ways[0].delivered), load_relaxed64(&flow.ways[1].delivered)

    def abort(self, token):
        """Reset both sides of a flow, or end a handshake; unknown tokens are left alone.

        Args:
            token: what relay() or handshake() returned.

        After: its completion follows, with REASON_ABORTED unless the flow ended first.
        """
        cdef Flow* flow
        cdef uint64_t name
        self.check("abort")
        name = _take_token(token)
        self.recheck("abort")
        flow = self.find(name)
        if flow != NULL and not flow.abort_asked:
            flow.abort_asked = 1
            submit_order(&self.core.workers[flow.worker], flow, <uint32_t>(flow - self.core.flows),
                         ORDER_ABORT)

    def doubt(self, token, side, *, quiet=False):
        """Take it that the far end of one side may be gone; unknown tokens are left alone.

        Args:
            token: what relay(), dial(), udp_bind() or udp_dial() returned.
            side: 1 = a, 2 = b; of a UDP relay the side of its link.
            quiet: ask it even if nothing that was sent to it waits for an answer.

        Raises:
            EngineClosed: after close(), or in a forked child.
            ValueError: there is no such side.

        After: nothing, if the end gives a sign of life. If instead it leaves what is sent or
            asked unanswered, for a tenth of the patience at least, the flow ends with
            REASON_RESET, ETIMEDOUT; also if something is sent only later.
        """
        cdef Flow* flow
        cdef uint64_t name
        cdef int which
        cdef bint is_quiet
        cdef uint32_t bits
        self.check("doubt")
        name = _take_token(token)
        which = _take_int(side)
        is_quiet = quiet
        if which not in (1, 2):
            raise ValueError(f"side: {which} is not 1 or 2")
        bits = (DOUBT_A if which == 1 else DOUBT_B) | (DOUBT_QUIET if is_quiet else 0)
        self.recheck("doubt")
        flow = self.find(name)
        if flow != NULL and not or32(&flow.doubts, bits):
            submit_order(&self.core.workers[flow.worker], flow, <uint32_t>(flow - self.core.flows),
                         ORDER_DOUBT)

    cdef Flow* find(self, uint64_t token) noexcept:
        cdef uint32_t slot = <uint32_t>token
        cdef Flow* flow
        if self.core == NULL or self.is_inherited() or not token:
            return NULL
        if slot >= self.core.fresh:
            return NULL
        flow = &self.core.flows[slot]
        return flow if load_relaxed32(&flow.generation) == <uint32_t>(token >> 32) else NULL

    def poll(self):
        """Collect what has ended, and the sources that gates did not know.

        Returns:
            Every waiting Completion, possibly none; never blocks. Also works after
            close(), for the flows that close() aborted.

        Raises:
            EngineClosed: in a forked child.
        """
        cdef list result = []
        cdef uint64_t item = 0
        cdef uint32_t slot
        cdef uint32_t i
        cdef Worker* w
        if self.is_inherited() or self.core == NULL:
            raise EngineClosed("poll", _errno.ECHILD)
        if self.core.notify >= 0:
            sys_unring(self.core.notify)
            exchange32(&self.core.notify_rung, 0)
        for i in range(self.core.crew):
            w = &self.core.workers[i]
            while ring_get(&w.outbox, &item):
                slot = <uint32_t>item
                if item >> EVENT_SHIFT == EVENT_PEER:
                    result.append(self.meet(slot))
                else:
                    self.part(w, slot, result)
        if not self.is_closed:
            self.lend()
        return result

    # A source has come to a gate, or comes again because more of its datagrams want links.
    cdef object meet(self, uint32_t slot):
        cdef Udp* udp = &self.core.udps[slot]
        if not udp.is_met:
            udp.is_met = 1
            self.core.announced += 1
        return _newcomer(self.core, slot)

    # A flow is over: report it and free its slot.
    cdef int part(self, Worker* w, uint32_t slot, list result) except -1:
        cdef Flow* flow = &self.core.flows[slot]
        cdef Udp* udp = &self.core.udps[slot]
        token = flow_token(flow, slot)
        if not flow_is_udp(flow):
            result.append(Completion(
                token, load_relaxed64(&flow.ways[0].delivered),
                load_relaxed64(&flow.ways[1].delivered), flow.reason, flow.side, flow.code,
                flow.detail,
            ))
        elif flow.kind != KIND_PEER or udp.is_met:
            result.append(UdpCompletion(
                token, _counts(udp), flow.reason, flow.side, flow.code, flow.detail
            ))
        if flow.legs[0].tls != NULL or flow.legs[1].tls != NULL:
            self.give_back(flow)
            self.tls_in_use -= <uint32_t>len(self.connections.pop(token))
        if flow.kind == KIND_DIALLED:
            self.drop_fresh(exchange32(&udp.fresh, 0))
        if flow.kind == KIND_GATE:
            del self.gates[slot]
            self.core.gates -= 1
            gate_free(udp)
        if flow.kind == KIND_PEER:
            self.core.lent -= 1
            self.core.announced -= udp.is_met
            if udp.gate in self.gates and submit_is_same_gate(self.core, udp):
                self.core.udps[udp.gate].own.lent -= 1
        else:
            w.load -= 1
        slot_give(self.core, slot)
        return 0

    def statistics(self):
        """Return a snapshot of all counters; also after close().

        Raises:
            EngineClosed: in a forked child.
        """
        cdef Counters total
        cdef uint32_t i
        if self.is_inherited() or self.core == NULL:
            raise EngineClosed("statistics", _errno.ECHILD)
        memset(&total, 0, sizeof(total))
        for i in range(self.core.crew):
            worker_add_counters(&total, &self.core.workers[i].counters)
        return EngineStatistics(
            threads=self.core.threads,
            flows_open=self.core.open_count - self.core.lent + self.core.announced,
            flows_total=self.core.total,
            flows_refused=self.core.refused,
            bytes_up=total.bytes_up,
            bytes_down=total.bytes_down,
            parked_bytes=total.parked_bytes,
            buffers_in_use=total.buffers_in_use + total.heads_open,
            pipes_in_use=total.pipes_in_use,
            pipes_pooled=total.pipes_pooled,
            splice_promotions=total.splice_promotions,
            turns=total.turns,
            wakeups=total.wakeups,
            stale_events=total.stale_events,
            bugs=total.bugs,
            fds_open=total.fds_open,
            tls_in_use=self.tls_in_use,
            handshakes=self.core.handshakes,
            handshakes_failed=total.handshakes_failed,
            gates_open=self.core.gates,
            peers_waiting=total.peers_waiting,
            datagrams_up=total.datagrams_up,
            datagrams_down=total.datagrams_down,
            datagrams_dropped=total.datagrams_dropped,
            datagram_bytes_held=total.datagram_bytes_held,
        )

    def close(self, deadline=5.0):
        """Reset every flow and join the threads.

        Args:
            deadline: seconds to wait for the threads.

        Returns:
            True when every thread has been joined (at once if closed before), False when
            the deadline passed first; then close() may be called again.

        After: poll() once more for the completions of the flows that were open. Stop
            watching fileno() before; its number is free afterwards.
        """
        cdef double seconds = deadline
        cdef double until = time.monotonic() + seconds
        cdef uint32_t i
        cdef uint32_t left = 0
        cdef int wait_ms
        if seconds != seconds:
            raise ValueError("deadline: it is not a number")
        if self.core == NULL or self.is_inherited():
            return True
        if not self.is_closed:
            self.is_closed = True
            _engines.discard(self)
            for i in range(self.core.crew):
                worker_stop(&self.core.workers[i])
        while True:
            left = worker_join_all(self.core)
            if left == 0 and self.closers:
                sys_ring(self.core.done)        # another thread waits: the last one out closes it
                return True
            if left == 0:
                core_close_events(self.core)
                return True
            wait_ms = <int>min(max((until - time.monotonic()) * 1000, 0), 1e9)
            if wait_ms == 0:
                return False
            self.closers += 1
            with nogil:
                sys_wait_readable(self.core.done, wait_ms)
                sys_unring(self.core.done)
            self.closers -= 1
